// What makes a manifest consistent, as in torchtrt_md/bundle/structure.py and rendezvous.py.
#pragma once

#include <string>
#include <vector>

#include "core/manifest.h"

namespace mdtrt {

// What the manifest says beside what a runner keeps of it.
struct Described {
    std::vector<std::string> constants, opaque, positional;
    std::string placement, transport;
};

// Raises Error (BundleError), naming the two parts that disagree.  Its work is linear in the manifest's size.
void check_structure(const Manifest& manifest, const Described& described);

} // namespace mdtrt
