// Included before every source, for wheels that run on older systems than the one that builds them: manylinux_2_28 has
// glibc 2.28. These functions have a new version since the release that is named, and the linker takes the newest one.
#pragma once

#include <features.h>

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

#if defined(__x86_64__)
#define ADEMAMIX_FIRST_GLIBC "GLIBC_2.2.5"
#else
#define ADEMAMIX_FIRST_GLIBC "GLIBC_2.17"
#endif
#define ADEMAMIX_FIRST_VERSION(name) ".symver " #name "," #name "@" ADEMAMIX_FIRST_GLIBC "\n"

// 2.29: exp and others no longer set errno through a wrapper; the results are the same. 2.34: libdl is a part of libc.
__asm__(ADEMAMIX_FIRST_VERSION(exp) ADEMAMIX_FIRST_VERSION(log) ADEMAMIX_FIRST_VERSION(pow)  //
        ADEMAMIX_FIRST_VERSION(dlopen) ADEMAMIX_FIRST_VERSION(dladdr) ADEMAMIX_FIRST_VERSION(dlsym)
            ADEMAMIX_FIRST_VERSION(dlerror));

// 2.32: std::shared_ptr counts without atomic operations if this is true. Here it is always false.
#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
extern "C" {
__attribute__((visibility("hidden"), weak)) char __libc_single_threaded = 0;
}
#endif

#undef ADEMAMIX_FIRST_VERSION
#undef ADEMAMIX_FIRST_GLIBC
#endif
