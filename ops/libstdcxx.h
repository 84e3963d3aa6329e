// Included before every source of a library, for wheels that run on older systems: what GCC 9 and 11 added to C++'s
// library, and headers call. torch's libraries export some of it, which ones depends on the version, and the linker
// would take those: a wheel couldn't tell that it needs them.
#pragma once

#include <new>
#include <sstream>

#if defined(__GLIBCXX__) && defined(__ELF__)

#if _GLIBCXX_RELEASE >= 9
template std::stringstream::basic_stringstream();
template std::ostringstream::basic_ostringstream();
template std::istringstream::basic_istringstream();
#endif

#if _GLIBCXX_RELEASE >= 11
#if __cplusplus >= 202002L
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
#endif
extern "C" {
[[noreturn]] __attribute__((visibility("hidden"), weak)) void ademamix_throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void ademamix_throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}
#endif
#endif
