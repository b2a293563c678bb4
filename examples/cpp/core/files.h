// Opens plain files inside of a bundle's folder, and nothing else: the folder may be anybody's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace mdtrt {

// Raises Error (BundleError) for a path that is not a plain relative one of printable ASCII.
void check_path(const std::string& path);

// An open plain file, reached through plain folders; no link is followed.
class File {
  public:
    File(const std::string& folder, const std::string& name); // raises Error (BundleError)
    explicit File(const std::string& path);                   // of the user; raises Error (InputError)
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    int descriptor() const { return descriptor_; }
    int64_t size() const { return size_; }

  private:
    int descriptor_ = -1;
    int64_t size_ = 0;
};

// A file's bytes, mapped: what is hashed is what is used, and nothing is held twice.
class Mapped {
  public:
    Mapped() = default;
    Mapped(const std::string& folder, const std::string& name); // raises Error (BundleError)
    explicit Mapped(const std::string& path);                   // of the user; raises Error (InputError)
    ~Mapped();
    Mapped(Mapped&& other) noexcept;
    Mapped& operator=(Mapped&& other) noexcept;

    std::string_view bytes() const { return {static_cast<const char*>(data_), static_cast<size_t>(size_)}; }

  private:
    void map(const File& file, const std::string& path);

    void* data_ = nullptr;
    int64_t size_ = 0;
};

// A whole file of the bundle; raises Error (BundleError) for one of more bytes than `limit`.
std::string read_file(const std::string& folder, const std::string& name, int64_t limit);

} // namespace mdtrt
