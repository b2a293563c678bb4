#include "core/files.h"

#include <sys/stat.h>

#include "core/guard.h"
#include "core/sha256.h"
#include "samples.h"

using namespace mdtrt;

TEST_CASE("paths stay inside of the bundle") {
    for (const char* path :
         {"", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "c:x", "a\nb", "\xc3\xa9", ".."})
        CHECK_SAYS(raised([&] { check_path(path); }), "not inside the bundle");
    for (const char* path : {"manifest.json", "engines/a.engine", "a b", "..x"})
        CHECK(raised([&] { check_path(path); }).empty());
}

TEST_CASE("plain files in plain folders are opened, and nothing else") {
    Folder folder;
    folder.write("file", "content");
    CHECK(Mapped(folder.path, "file").bytes() == "content");
    CHECK(read_file(folder.path, "file", 7) == "content");
    CHECK_SAYS(raised([&] { read_file(folder.path, "file", 6); }), "more than 6 bytes");
    CHECK(Mapped(folder.path, "file").bytes().size() == 7);
    folder.write("empty", "");
    CHECK(Mapped(folder.path, "empty").bytes().empty());
    std::filesystem::create_directory(folder.path + "/inner");
    std::filesystem::create_symlink("file", folder.path + "/link");
    std::filesystem::create_symlink("inner", folder.path + "/linked");
    folder.write("inner/x", "x");
    mkfifo((folder.path + "/pipe").c_str(), 0600);
    CHECK(Mapped(folder.path, "inner/x").bytes() == "x");
    CHECK_SAYS(raised([&] { Mapped(folder.path, "link"); }), "is a link");
    CHECK_SAYS(raised([&] { Mapped(folder.path, "linked/x"); }), "is a link");
    CHECK_SAYS(raised([&] { Mapped(folder.path, "pipe"); }), "is a pipe");
    CHECK_SAYS(raised([&] { Mapped(folder.path, "inner"); }), "is a folder");
    CHECK_SAYS(raised([&] { Mapped(folder.path, "file/x"); }), "is a file");
    CHECK_SAYS(raised([&] { Mapped(folder.path, "absent"); }), "cannot be read");
    CHECK_SAYS(raised([&] { Mapped(folder.path + "/nowhere", "x"); }), "cannot be read");
}

TEST_CASE("sha256 is that of the standard") {
    CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_CASE("a library that is no TensorRT is refused") {
    Flavour rtx{"TensorRT-RTX", 1, 6, 1, 120};
    CHECK(rtx.soname() == "libtensorrt_rtx.so.1");
    CHECK(Flavour{"TensorRT", 11, 1, 0, 106}.soname() == "libnvinfer.so.11");
    Library c("libc.so.6", "the C library", "");
    CHECK(c.soname() == "libc.so.6");
    CHECK_SAYS(raised([&] { check_library(c, rtx); }), "no TensorRT: it has no getInferLibMajorVersion");
    CHECK_SAYS(raised([&] { check_library(c, rtx); }), "compiled for TensorRT-RTX 1.6.1.120");
    CHECK_SAYS(raised([] { Library("libabsent.so.9", "NCCL", "give its path"); }), "NCCL cannot be loaded");
}
