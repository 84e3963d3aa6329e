#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace ademamix {

// fstatat, by the kernel's own call: before 2.33, glibc had no functions stat, fstat and fstatat, and wheels run on
// older ones. An empty name, with AT_EMPTY_PATH, is the file of the descriptor itself.
inline int file_status(int folder, const char* name, struct stat* status, int flags) {
  return static_cast<int>(syscall(SYS_newfstatat, folder, name, status, flags));
}

inline int file_status(int file, struct stat* status) { return file_status(file, "", status, AT_EMPTY_PATH); }

}  // namespace ademamix
