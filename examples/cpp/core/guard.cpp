#include "core/guard.h"

#include <dlfcn.h>
#include <link.h>

#include "core/error.h"
#include "core/text.h"

namespace mdtrt {
namespace {

const char* const kRebuild = "build the runner with the headers of the library that it shall load (make cpp"
                             " TENSORRT_INCLUDE=...), or give it the other library (--tensorrt)";

const link_map* map_of(void* handle) {
    link_map* map = nullptr;
    return dlinfo(handle, RTLD_DI_LINKMAP, &map) ? nullptr : map;
}

std::string dotted(int a, int b, int c, int d) {
    return std::to_string(a) + "." + std::to_string(b) + "." + std::to_string(c) + "." + std::to_string(d);
}

} // namespace

std::string Flavour::version() const { return dotted(major, minor, patch, build); }

std::string Flavour::soname() const {
    return (is_rtx() ? "libtensorrt_rtx.so." : "libnvinfer.so.") + std::to_string(major);
}

Library::Library(const std::string& path, const std::string& what, const std::string& fix) : what_(what) {
    // Global: a library that opens another by name must find the one that was chosen here.
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (!handle_) {
        const char* reason = dlerror();
        throw launch_error(what + " cannot be loaded: " + (reason ? reason : path), fix);
    }
}

void* Library::find(const std::string& symbol) const { return dlsym(handle_, symbol.c_str()); }

void* Library::required(const char* symbol) const {
    if (void* found = find(symbol)) return found;
    throw launch_error(path() + " has no " + symbol + ", so it is not the " + what_ +
                       " that this program was made for");
}

std::string Library::path() const {
    const link_map* map = map_of(handle_);
    return map && map->l_name ? map->l_name : what_;
}

std::string Library::soname() const {
    const link_map* map = map_of(handle_);
    const char* strings = nullptr;
    size_t offset = 0;
    for (const ElfW(Dyn)* entry = map ? map->l_ld : nullptr; entry && entry->d_tag != DT_NULL; ++entry) {
        if (entry->d_tag == DT_STRTAB) strings = reinterpret_cast<const char*>(entry->d_un.d_ptr);
        if (entry->d_tag == DT_SONAME) offset = entry->d_un.d_val;
    }
    return strings && offset ? strings + offset : "";
}

void check_library(const Library& library, const Flavour& compiled) {
    auto refuse = [&](const std::string& found) {
        return launch_error(library.path() + " is " + found + ", and this program was compiled for " + compiled.name +
                                " " + compiled.version() + "; it would call the wrong functions",
                            kRebuild);
    };
    const char* const kNumbers[] = {"getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion",
                                    "getInferLibBuildVersion"};
    int found[4];
    for (int i = 0; i < 4; ++i) {
        auto number = reinterpret_cast<int (*)()>(library.find(kNumbers[i]));
        if (!number) throw refuse("no TensorRT: it has no " + std::string(kNumbers[i]));
        found[i] = number();
    }
    std::string version = dotted(found[0], found[1], found[2], found[3]);
    if (version != compiled.version()) throw refuse("of version " + version);
    // Encoded as NV_TENSORRT_VERSION has it.
    auto encoded = reinterpret_cast<int (*)()>(library.find("getInferLibVersion"));
    if (!encoded || encoded() != found[0] * 10000 + found[1] * 100 + found[2])
        throw refuse("of two versions: getInferLibVersion says " + std::to_string(encoded ? encoded() : 0));
    std::string soname = library.soname();
    if (soname != compiled.soname())
        throw refuse(in_quotes(soname) + " by its own name, not " + in_quotes(compiled.soname()));
    std::string marker = "tensorrt_version_" + std::to_string(found[0]) + "_" + std::to_string(found[1]) + "_" +
                         std::to_string(found[2]) + "_" + std::to_string(found[3]);
    if (compiled.is_rtx() && !library.find(marker))
        throw refuse("no TensorRT-RTX " + version + ": it has no " + marker);
}

void check_versions(const Manifest& manifest, const Flavour& compiled) {
    const Versions& built = manifest.versions;
    if (built.flavour == compiled.name && built.tensorrt == compiled.version()) return;
    throw bundle_error("the bundle was built with " + built.flavour + " " + built.tensorrt +
                           " and this program is for " + compiled.name + " " + compiled.version() +
                           "; an engine runs only under the exact version that built it",
                       "build the runner with the headers of " + built.flavour + " " + built.tensorrt +
                           ", or export the bundle again with " + compiled.name + " " + compiled.version());
}

} // namespace mdtrt
