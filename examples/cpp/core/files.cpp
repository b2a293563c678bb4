#include "core/files.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/text.h"

namespace mdtrt {
namespace {

const char* const kCopy = "copy the whole bundle folder to every host";

Error unreadable(const std::string& path, int code) {
    return bundle_error(path + " cannot be read: " + std::strerror(code), kCopy);
}

const char* kind(mode_t mode) {
    switch (mode & S_IFMT) {
    case S_IFREG: return "a file";
    case S_IFLNK: return "a link";
    case S_IFDIR: return "a folder";
    case S_IFIFO: return "a pipe";
    case S_IFSOCK: return "a socket";
    default: return "a device";
    }
}

std::vector<std::string> split(const std::string& path) {
    std::vector<std::string> parts(1);
    for (char c : path) {
        if (c == '/')
            parts.emplace_back();
        else
            parts.back() += c;
    }
    return parts;
}

int64_t plain_size(int descriptor, const std::string& path) {
    struct stat status;
    if (fstat(descriptor, &status)) throw unreadable(path, errno);
    if (!S_ISREG(status.st_mode)) throw bundle_error(path + " is no plain file", kCopy);
    return status.st_size;
}

} // namespace

void check_path(const std::string& path) {
    bool plain = !path.empty();
    for (unsigned char c : path) plain = plain && c >= 0x20 && c < 0x7f && c != '\\' && c != ':';
    for (const auto& part : split(path)) plain = plain && !part.empty() && part != "." && part != "..";
    if (!plain)
        throw bundle_error("the manifest names the file " + in_quotes(path) + ", which is not inside the bundle",
                           "export the bundle again; do not edit manifest.json by hand");
}

File::File(const std::string& folder, const std::string& name) {
    check_path(name);
    std::string path = folder;
    int at = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); // the user's own, which may be a link
    if (at < 0) throw unreadable(folder, errno);
    auto parts = split(name);
    for (size_t i = 0; i < parts.size(); ++i) {
        bool last = i + 1 == parts.size();
        path += "/" + parts[i];
        struct stat status;
        if (fstatat(at, parts[i].c_str(), &status, AT_SYMLINK_NOFOLLOW)) {
            int code = errno;
            close(at);
            throw unreadable(path, code);
        }
        if ((status.st_mode & S_IFMT) != (last ? S_IFREG : S_IFDIR)) {
            close(at);
            throw bundle_error(path + " is " + kind(status.st_mode) + ", and a bundle has " +
                                   (last ? "a file" : "a folder") + " there",
                               std::string(kCopy) +
                                   (S_ISLNK(status.st_mode) ? ", with what its links lead to (cp -rL)" : ""));
        }
        // Should it have become a link or a pipe since: neither followed nor waited for.
        int next =
            openat(at, parts[i].c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | (last ? 0 : O_DIRECTORY));
        int code = errno;
        close(at);
        if (next < 0) throw unreadable(path, code);
        at = next;
    }
    descriptor_ = at;
    try {
        size_ = plain_size(at, path);
    } catch (...) {
        close(at);
        throw;
    }
}

File::File(const std::string& path) {
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat status;
    if (descriptor_ < 0 || fstat(descriptor_, &status)) {
        int code = errno;
        if (descriptor_ >= 0) close(descriptor_);
        throw input_error(path + " cannot be read: " + std::strerror(code), "give a safetensors file");
    }
    if (!S_ISREG(status.st_mode)) {
        close(descriptor_);
        throw input_error(path + " is " + kind(status.st_mode), "give a safetensors file");
    }
    size_ = status.st_size;
}

File::~File() {
    if (descriptor_ >= 0) close(descriptor_);
}

Mapped::Mapped(const std::string& folder, const std::string& name) { map(File(folder, name), folder + "/" + name); }

Mapped::Mapped(const std::string& path) { map(File(path), path); }

void Mapped::map(const File& file, const std::string& path) {
    size_ = file.size();
    if (size_ == 0) return;
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
    if (data_ == MAP_FAILED) {
        data_ = nullptr;
        throw unreadable(path, errno);
    }
}

Mapped::~Mapped() {
    if (data_) munmap(data_, size_);
}

Mapped::Mapped(Mapped&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

Mapped& Mapped::operator=(Mapped&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

std::string read_file(const std::string& folder, const std::string& name, int64_t limit) {
    File file(folder, name);
    std::string data;
    char chunk[1 << 16];
    while (true) {
        ssize_t got = read(file.descriptor(), chunk, sizeof chunk);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw unreadable(folder + "/" + name, errno);
        if (got == 0) return data;
        data.append(chunk, got);
        if (static_cast<int64_t>(data.size()) > limit)
            throw bundle_error(folder + "/" + name + " has more than " + std::to_string(limit) +
                                   " bytes, the most that are read of such a file",
                               "export the bundle again; do not edit its files by hand");
    }
}

} // namespace mdtrt
