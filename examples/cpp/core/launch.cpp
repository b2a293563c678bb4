#include "core/launch.h"

#include <cstdlib>

#include "core/error.h"
#include "core/text.h"

namespace mdtrt {
namespace {

constexpr int kPort = 29533; // where nothing says another

struct Launcher {
    const char* name;
    const char* rank;
    const char* size;
    const char* local; // "" where it has none
    const char* job;
    const char* same_host; // the number of ranks on this host, "" where it has none
};

// Slurm is last: its variables are also in the environment of what a job starts by other means.
constexpr Launcher kLaunchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "PMIX_NAMESPACE",
     "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "PMI_JOBID", "MPI_LOCALNRANKS"},
    {"TRT_MY_RANK", "TRT_MY_RANK", "TRT_WORLD_SIZE", "", "", ""},
    {"Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", ""},
};

std::string text(const Environment& environment, const char* name) {
    const char* found = *name ? environment(name) : nullptr;
    return found ? found : "";
}

int number(const Environment& environment, const char* name, int least, int most) {
    std::string found = text(environment, name);
    bool digits = !found.empty() && found.size() < 10 && found.find_first_not_of("0123456789") == std::string::npos;
    int value = digits ? std::atoi(found.c_str()) : -1;
    if (value < least || value > most)
        throw launch_error(std::string(name) + " is " + in_quotes(found) + ", and must be a number from " +
                               std::to_string(least) + " to " + std::to_string(most),
                           "let the launcher set it, or set it on every rank");
    return value;
}

void find_meeting_place(const Environment& environment, const Launcher& launcher, Launch& launch) {
    for (const char* name : {"MDTRT_FILE", "TRT_NCCL_ID_FILE"})
        if (launch.file.empty()) launch.file = text(environment, name);
    if (environment("MDTRT_PORT")) {
        launch.port = number(environment, "MDTRT_PORT", 1, 65535);
        launch.port_from = "MDTRT_PORT";
    } else if (environment("MASTER_PORT")) {
        // torchrun's own store listens on MASTER_PORT
        launch.port = number(environment, "MASTER_PORT", 1, 65534) + 1;
        launch.port_from = "MASTER_PORT + 1";
    } else {
        launch.port = kPort;
        launch.port_from = "the default";
    }
    std::string address = text(environment, "MASTER_ADDR");
    bool nodes_known = environment("SLURM_NNODES") != nullptr;
    bool one_host = *launcher.same_host && environment(launcher.same_host)
                        ? number(environment, launcher.same_host, 1, 1 << 20) == launch.size
                        : !nodes_known || text(environment, "SLURM_NNODES") == "1";
    if (!address.empty())
        launch.address = address;
    else if (!one_host && launch.file.empty())
        throw launch_error("the ranks are on several hosts, and MASTER_ADDR does not say on which rank 0 is",
                           "set MASTER_ADDR to the host of rank 0 on every rank, or MDTRT_FILE to a path that all hosts"
                           " share");
}

} // namespace

const char* process_environment(const char* name) { return std::getenv(name); }

Launch launch_from(const Environment& environment, int size) {
    std::string advice = "torchrun --no-python --nproc_per_node=" + std::to_string(size) + " mdtrt_run ...";
    Launch launch;
    for (const Launcher& launcher : kLaunchers) {
        if (!environment(launcher.rank)) continue;
        if (!environment(launcher.size))
            throw launch_error(std::string(launcher.rank) + " is set and " + launcher.size + " is not", advice);
        launch.launcher = launcher.name;
        launch.size = number(environment, launcher.size, 1, 1 << 20);
        launch.rank = number(environment, launcher.rank, 0, launch.size - 1);
        const char* local = *launcher.local ? launcher.local : "LOCAL_RANK";
        if (environment(local)) launch.local_rank = number(environment, local, 0, 1 << 20);
        launch.job = text(environment, launcher.job) + "/" + text(environment, "TORCHELASTIC_RESTART_COUNT") + "/" +
                     text(environment, "MDTRT_JOB");
        find_meeting_place(environment, launcher, launch);
        return launch;
    }
    if (size > 1)
        throw launch_error("the bundle is for " + std::to_string(size) +
                               " ranks, and nothing in the environment says"
                               " which one this process is",
                           advice + ", mpiexec -n " + std::to_string(size) +
                               " mdtrt_run ..., or set TRT_MY_RANK and"
                               " TRT_WORLD_SIZE");
    launch.launcher = "one process";
    return launch;
}

} // namespace mdtrt
