#include "trt/library.h"

#include <NvInferVersion.h>

#if defined(TRT_MAJOR_RTX) == defined(TRT_MAJOR_ENTERPRISE)
#error "NvInferVersion.h says neither TensorRT-RTX nor TensorRT: give the headers of one of them"
#endif

namespace mdtrt {

Flavour compiled_flavour() {
#ifdef TRT_MAJOR_RTX
    const char* name = "TensorRT-RTX";
#else
    const char* name = "TensorRT";
#endif
    return {name, NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, NV_TENSORRT_BUILD};
}

Library open_tensorrt(const std::string& path) {
    Flavour compiled = compiled_flavour();
    Library library(path.empty() ? compiled.soname() : path, compiled.name,
                    "give its path (--tensorrt), or put its folder into LD_LIBRARY_PATH; pip install " +
                        std::string(compiled.is_rtx() ? "tensorrt-rtx==" : "tensorrt==") + compiled.version() +
                        " has it");
    check_library(library, compiled);
    return library;
}

} // namespace mdtrt
