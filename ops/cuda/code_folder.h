// Folders of compiled kernels, which processes on several machines may share.
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>

#include "nvrtc.h"

namespace ademamix {

// An open file or folder.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(other.number_) { other.number_ = -1; }
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor();

  int get() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }

 private:
  int number_;
};

class CodeFolder {
 public:
  // Code runs with the user's rights: files must belong to this user or to root, or, if `trusts_owner`, to the owner of
  // the folder, and nobody else may be able to write to them.
  CodeFolder(const std::string& path, bool trusts_owner) : path_(path), trusts_owner_(trusts_owner) {}

  const std::string& path() const { return path_; }

  // Returns false if there is no such file, if it is damaged, or if it isn't trusted, of which one warning is given.
  bool read(const std::string& name, DeviceCode& code) const;

  // Readers see the whole file or none. If the folder can't be written to, each process compiles for itself.
  void write(const std::string& name, const DeviceCode& code) const;

  // Whether this process prints messages about the folder: the first to ask, of all that use it at a time.
  bool speaks() const;

  // Calls `compile` while no other process does so for a file of that name, or calls nothing if `there()`. Doesn't wait
  // if another process takes very long, or if there are no locks.
  void alone(const std::string& name, const std::function<bool()>& there, const std::function<void()>& compile) const;

 private:
  Descriptor open_folder() const;
  Descriptor open_lock_file() const;
  void remove_leftovers(const Descriptor& folder) const;
  bool trusted(const Descriptor& folder, const Descriptor& file) const;

  std::string path_;
  bool trusts_owner_;
};

// The first line of a file: the kernel's name, the bytes of code, and their hash. The code follows.
std::string header_line(const DeviceCode& code);

// Makes missing folders, for this user alone.
void make_folders(const std::string& path);

}  // namespace ademamix
