#include "code_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <thread>

#include "file_status.h"

// Files are accessed by C functions: libtorch and this library may have C++ files, streams and locales of different
// compilers, which the loader mixes up.

namespace ademamix {
namespace {

constexpr char LOCK_FILE[] = "lock";
constexpr char UNFINISHED[] = ".unfinished";  // ends the names of files that are being written
constexpr int LEFTOVER_SECONDS = 3600;        // after which their writers are taken for dead
constexpr auto LONGEST_WAIT = std::chrono::minutes(2);
constexpr auto POLL = std::chrono::milliseconds(20);

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string read_all(const Descriptor& file) {
  std::string text;
  char part[1 << 16];
  for (ssize_t bytes; (bytes = ::read(file.get(), part, sizeof part)) != 0;) {
    if (bytes > 0)
      text.append(part, static_cast<size_t>(bytes));
    else if (errno != EINTR)
      return "";
  }
  return text;
}

bool write_all(const Descriptor& file, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t bytes = ::write(file.get(), text.data() + done, text.size() - done);
    if (bytes < 0 && errno != EINTR) return false;
    if (bytes > 0) done += static_cast<size_t>(bytes);
  }
  return true;
}

// Returns a name that no other process has or can guess: processes on other machines may have the same id.
std::string unique_name(const std::string& name) {
  uint64_t random[2];
  if (getrandom(random, sizeof random, 0) != sizeof random) return "";
  char text[64];
  std::snprintf(text, sizeof text, ".%ld-%016llx%016llx", static_cast<long>(getpid()),
                static_cast<unsigned long long>(random[0]), static_cast<unsigned long long>(random[1]));
  return name + text + UNFINISHED;
}

// A lock on one byte of a file, which stands for something else. It is released when the file is closed, also if the
// process is killed.
bool try_lock(const Descriptor& file, off_t byte, bool& supported) {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  if (fcntl(file.get(), F_OFD_SETLK, &lock) == 0) return true;
  supported = errno == EAGAIN || errno == EACCES || errno == EINTR;
  return false;
}

constexpr off_t SPEAKER = 0;

off_t byte_of(const std::string& name) { return 1 + static_cast<off_t>(hash(name) >> 2); }

}  // namespace

Descriptor::~Descriptor() {
  if (number_ >= 0) close(number_);
}

std::string header_line(const DeviceCode& code) {
  return code.entry + ' ' + std::to_string(code.image.size()) + ' ' + std::to_string(hash(code.image)) + '\n';
}

void make_folders(const std::string& path) {
  for (size_t end = 1; end != std::string::npos;) {
    end = path.find('/', end + 1);
    mkdir(path.substr(0, end).c_str(), 0700);
  }
}

Descriptor CodeFolder::open_folder() const {
  return Descriptor(path_.empty() ? -1 : open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

Descriptor CodeFolder::open_lock_file() const {
  make_folders(path_);
  return Descriptor(
      openat(open_folder().get(), LOCK_FILE, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600));
}

bool CodeFolder::trusted(const Descriptor& folder, const Descriptor& file) const {
  struct stat status, of_folder;
  if (file_status(file.get(), &status) != 0 || file_status(folder.get(), &of_folder) != 0) return false;
  const bool owner =
      status.st_uid == geteuid() || status.st_uid == 0 || (trusts_owner_ && status.st_uid == of_folder.st_uid);
  return S_ISREG(status.st_mode) && owner && (status.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

bool CodeFolder::read(const std::string& name, DeviceCode& code) const {
  const Descriptor folder = open_folder();
  if (!folder) return false;
  const Descriptor file(openat(folder.get(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!file && errno != ELOOP) return false;
  if (!file || !trusted(folder, file)) {
    static const bool told =
        std::fprintf(stderr,
                     "torch_ademamix: %s/%s isn't used: it is a link, belongs to another user, or may be written to by "
                     "others; remove it\n",
                     path_.c_str(), name.c_str()) > 0;
    static_cast<void>(told);
    return false;
  }
  const std::string text = read_all(file);
  const size_t end = text.find('\n');
  if (end == std::string::npos) return false;
  code = {text.substr(0, text.find(' ')), text.substr(end + 1)};
  return text.compare(0, end + 1, header_line(code)) == 0;
}

void CodeFolder::write(const std::string& name, const DeviceCode& code) const {
  make_folders(path_);
  const Descriptor folder = open_folder();
  const std::string unfinished = unique_name(name);
  if (!folder || unfinished.empty()) return;
  remove_leftovers(folder);
  bool written = false;
  {
    const Descriptor file(
        openat(folder.get(), unfinished.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (!file) return;
    written = write_all(file, header_line(code) + code.image);
  }
  if (!written || renameat(folder.get(), unfinished.c_str(), folder.get(), name.c_str()) != 0)
    unlinkat(folder.get(), unfinished.c_str(), 0);
}

// Removes the files that killed writers have left.
void CodeFolder::remove_leftovers(const Descriptor& folder) const {
  const std::unique_ptr<DIR, int (*)(DIR*)> open(opendir(path_.c_str()), closedir);
  while (const dirent* entry = open ? readdir(open.get()) : nullptr) {
    struct stat status;
    if (ends_with(entry->d_name, UNFINISHED) &&
        file_status(folder.get(), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 &&
        status.st_mtime < std::time(nullptr) - LEFTOVER_SECONDS)
      unlinkat(folder.get(), entry->d_name, 0);
  }
}

bool CodeFolder::speaks() const {
  static const bool speaks = [&] {
    static const Descriptor file = open_lock_file();  // never closed, so the lock is kept
    bool supported = true;
    if (file && try_lock(file, SPEAKER, supported)) return true;
    if (file && supported) return false;
    const char* rank = std::getenv("LOCAL_RANK");
    return !rank || std::string(rank) == "0";
  }();
  return speaks;
}

void CodeFolder::alone(const std::string& name, const std::function<bool()>& there,
                       const std::function<void()>& compile) const {
  const Descriptor file = open_lock_file();
  const auto end = std::chrono::steady_clock::now() + LONGEST_WAIT;
  for (bool supported = true; file && supported && !try_lock(file, byte_of(name), supported);) {
    if (std::chrono::steady_clock::now() > end) break;
    std::this_thread::sleep_for(POLL);
    if (there()) return;
  }
  if (!there()) compile();
}

}  // namespace ademamix
