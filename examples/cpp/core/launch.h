// Who this process is among the ranks of its launch, from the environment that the launcher made.
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace mdtrt {

struct Launch {
    int rank = 0, size = 1;
    std::optional<int> local_rank; // none: counted among the ranks of the same host
    std::string launcher;          // for messages
    std::string address = "127.0.0.1";
    int port = 0;
    std::string port_from; // which variable said so
    std::string file;      // rank 0 says in it where it listens; "" where address and port are known
    std::string job;       // what this launch's ranks have in common, and other launches have not
};

// Looks a variable of the environment up; null where it is not set.
using Environment = std::function<const char*(const char*)>;
const char* process_environment(const char* name);

// torchrun, Open MPI, MPICH, NVIDIA's TRT_MY_RANK and TRT_WORLD_SIZE, Slurm, or a single process, in this order: the
// first that is there started this process.  `size` is that of the bundle, for messages.
//
// Raises Error (LaunchError): a variable that is missing or makes no sense, naming it.
Launch launch_from(const Environment& environment, int size);

} // namespace mdtrt
