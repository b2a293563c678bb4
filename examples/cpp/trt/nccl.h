// NCCL, opened at run time: one communicator for each axis of the mesh that engines communicate on.
#pragma once

#include <memory>
#include <string>

#include "core/guard.h"

namespace mdtrt {

class Nccl {
  public:
    explicit Nccl(const std::string& path); // "" for libnccl.so.2 of the loader's path; raises Error (LaunchError)

    std::string version() const; // 2.28.9
    std::string path() const { return library_.path(); }
    std::string unique_id() const; // bytes, for the ranks of one communicator
    // Collective among those ranks.  Raises Error (CommunicatorError).
    void* make(int size, const std::string& id, int rank) const;
    void destroy(void* communicator) const;
    void abort(void* communicator) const;

  private:
    void check(int status, const char* what) const;

    Library library_;
};

} // namespace mdtrt
