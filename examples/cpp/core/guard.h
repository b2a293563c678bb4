// Which TensorRT a library is, asked before anything of it is called.
//
// The flavours of TensorRT, and their versions, have the same names and other virtual tables: a program made with the
// headers of one and run with the library of another calls the wrong methods, which may report success.  Neither the
// library nor its loader sees that.  So the program brings the numbers that it was compiled with, and they are compared
// with what plain functions of the library say, with its name and with the manifest.  No vendor header is needed here.
#pragma once

#include <string>

#include "core/manifest.h"

namespace mdtrt {

struct Flavour {
    std::string name; // "TensorRT-RTX" or "TensorRT", as in the manifest
    int major, minor, patch, build;

    std::string version() const; // 1.6.1.120
    bool is_rtx() const { return name == "TensorRT-RTX"; }
    std::string soname() const; // libtensorrt_rtx.so.1
};

// A library that was opened by dlopen and is never closed: what it started may still run.
class Library {
  public:
    // Raises Error (LaunchError): it cannot be opened; `what` and `fix` say what it is and how to get it.
    Library(const std::string& path, const std::string& what, const std::string& fix);

    void* find(const std::string& symbol) const; // null where there is none
    template <class F> F function(const char* symbol) const { return reinterpret_cast<F>(required(symbol)); }
    std::string path() const;   // where it really lies
    std::string soname() const; // what it calls itself, "" where it does not say

  private:
    void* required(const char* symbol) const; // raises Error (LaunchError)

    void* handle_;
    std::string what_;
};

// Raises Error (LaunchError): the library is not exactly the TensorRT that this program was compiled for.
void check_library(const Library& library, const Flavour& compiled);

// Raises Error (BundleError): the bundle was built with another TensorRT than this program was compiled for.
void check_versions(const Manifest& manifest, const Flavour& compiled);

} // namespace mdtrt
