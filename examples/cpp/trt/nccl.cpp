#include "trt/nccl.h"

#include <cstring>
#include <nccl.h>

#include "core/error.h"

namespace mdtrt {

Nccl::Nccl(const std::string& path)
    : library_(path.empty() ? "libnccl.so.2" : path, "NCCL",
               "give its path (--nccl), or put its folder into LD_LIBRARY_PATH; pip install nvidia-nccl-cu13 has it in "
               "nvidia/nccl/lib") {
    // The functions used here are the same in all of NCCL 2.
    if (version().compare(0, 2, "2.") != 0)
        throw launch_error(library_.path() + " is NCCL " + version() + ", and this program is for NCCL 2",
                           "give NCCL 2 (--nccl)");
}

std::string Nccl::version() const {
    int number = 0;
    check(library_.function<decltype(&ncclGetVersion)>("ncclGetVersion")(&number), "asking for the version");
    return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
           std::to_string(number % 100);
}

std::string Nccl::unique_id() const {
    ncclUniqueId id;
    check(library_.function<decltype(&ncclGetUniqueId)>("ncclGetUniqueId")(&id), "making an id");
    return {reinterpret_cast<const char*>(&id), sizeof id};
}

void* Nccl::make(int size, const std::string& id, int rank) const {
    ncclUniqueId unique;
    if (id.size() != sizeof unique) throw launch_error("an NCCL id has " + std::to_string(id.size()) + " bytes");
    std::memcpy(&unique, id.data(), sizeof unique);
    ncclComm_t communicator = nullptr;
    check(library_.function<decltype(&ncclCommInitRank)>("ncclCommInitRank")(&communicator, size, unique, rank),
          "making a communicator");
    return communicator;
}

void Nccl::destroy(void* communicator) const {
    check(library_.function<decltype(&ncclCommDestroy)>("ncclCommDestroy")(static_cast<ncclComm_t>(communicator)),
          "letting go of a communicator");
}

void Nccl::abort(void* communicator) const {
    library_.function<decltype(&ncclCommAbort)>("ncclCommAbort")(static_cast<ncclComm_t>(communicator)); // best effort
}

void Nccl::check(int status, const char* what) const {
    if (status == ncclSuccess) return;
    auto text = library_.function<decltype(&ncclGetErrorString)>("ncclGetErrorString");
    throw Error("CommunicatorError", std::string(what) + " failed in NCCL: " + text(static_cast<ncclResult_t>(status)),
                "NCCL_DEBUG=INFO says more");
}

} // namespace mdtrt
