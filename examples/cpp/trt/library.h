// TensorRT, opened at run time, and known to be the one that this program was compiled for.
#pragma once

#include <string>

#include "core/guard.h"

namespace mdtrt {

Flavour compiled_flavour(); // of the headers that this program was compiled with

// "" for the library's own name on the loader's path.  Raises Error (LaunchError): there is none, or it is another one.
Library open_tensorrt(const std::string& path);

} // namespace mdtrt
