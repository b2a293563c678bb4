// What the tests have in common.
#pragma once

#include <doctest/doctest.h>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <unistd.h>

#include "core/error.h"

// Of tests/cpp/samples.py, which writes them.
inline std::string sample(const std::string& name) {
    std::ifstream file(std::string(MDTRT_SAMPLES) + "/" + name + ".json", std::ios::binary);
    REQUIRE(file);
    return {std::istreambuf_iterator<char>(file), {}};
}

inline std::string replaced(std::string text, const std::string& from, const std::string& to) {
    size_t at = text.find(from);
    REQUIRE_MESSAGE(at != std::string::npos, "no " << from);
    return text.replace(at, from.size(), to);
}

// A folder of the test's own, deleted with it.
struct Folder {
    std::string path = (std::filesystem::temp_directory_path() / ("mdtrt_tests_" + std::to_string(getpid()))).string();
    Folder() { std::filesystem::create_directories(path); }
    ~Folder() { std::filesystem::remove_all(path); }
    std::string write(const std::string& name, const std::string& bytes) const {
        std::ofstream(path + "/" + name, std::ios::binary) << bytes;
        return path + "/" + name;
    }
};

// The message of the Error that this raises, with its kind before it; "" where it raises none.
template <class F> std::string raised(F work) {
    try {
        work();
    } catch (const mdtrt::Error& error) { return error.kind + ": " + error.what(); }
    return "";
}

#define CHECK_SAYS(message, part) CHECK_MESSAGE((message).find(part) != std::string::npos, (message))
