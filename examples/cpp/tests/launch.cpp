#include "core/launch.h"

#include <map>

#include "samples.h"

using namespace mdtrt;

static Launch launched(const std::map<std::string, std::string>& variables, int size = 4) {
    return launch_from(
        [&](const char* name) {
            auto found = variables.find(name);
            return found == variables.end() ? nullptr : found->second.c_str();
        },
        size);
}

TEST_CASE("torchrun") {
    Launch launch = launched({{"RANK", "3"},
                              {"WORLD_SIZE", "4"},
                              {"LOCAL_RANK", "1"},
                              {"LOCAL_WORLD_SIZE", "2"},
                              {"MASTER_ADDR", "host7"},
                              {"MASTER_PORT", "29500"}});
    CHECK(launch.launcher == "torchrun");
    CHECK(launch.rank == 3);
    CHECK(launch.size == 4);
    CHECK(launch.local_rank == 1);
    CHECK(launch.address == "host7");
    CHECK(launch.port == 29501); // MASTER_PORT is its own store's
    CHECK(launched({{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"MASTER_PORT", "29500"}, {"MDTRT_PORT", "4000"}}).port ==
          4000);
}

TEST_CASE("Open MPI, whose local ranks need not follow the ranks") {
    Launch launch = launched({{"OMPI_COMM_WORLD_RANK", "1"},
                              {"OMPI_COMM_WORLD_SIZE", "4"},
                              {"OMPI_COMM_WORLD_LOCAL_RANK", "2"},
                              {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}});
    CHECK(launch.rank == 1);
    CHECK(launch.local_rank == 2);
    CHECK(launch.address == "127.0.0.1");
}

TEST_CASE("MPICH, Slurm and NVIDIA's variables") {
    CHECK(launched({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}}).local_rank == 1);
    Launch slurm = launched({{"SLURM_PROCID", "1"},
                             {"SLURM_NTASKS", "2"},
                             {"SLURM_LOCALID", "1"},
                             {"SLURM_NNODES", "1"},
                             {"SLURM_JOB_ID", "77"}});
    CHECK(slurm.launcher == "Slurm");
    CHECK(slurm.local_rank == 1);
    CHECK(slurm.job.find("77") != std::string::npos);
    Launch plain = launched({{"TRT_MY_RANK", "1"}, {"TRT_WORLD_SIZE", "2"}, {"TRT_NCCL_ID_FILE", "/shared/id"}});
    CHECK(plain.rank == 1);
    CHECK(!plain.local_rank);
    CHECK(plain.file == "/shared/id");
}

TEST_CASE("what started the process goes before what surrounds it") {
    std::map<std::string, std::string> slurm = {{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}, {"SLURM_NNODES", "1"}};
    auto both = slurm;
    both.insert({{"RANK", "1"}, {"WORLD_SIZE", "2"}});
    CHECK(launched(both).launcher == "torchrun");
    both = slurm;
    both.insert({{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}});
    CHECK(launched(both).launcher == "Open MPI");
}

TEST_CASE("one process runs a bundle of one rank, and no other") {
    CHECK(launched({}, 1).size == 1);
    CHECK_SAYS(raised([] { launched({}, 4); }), "torchrun --no-python --nproc_per_node=4");
}

TEST_CASE("variables that make no sense are named") {
    CHECK_SAYS(raised([] { launched({{"RANK", "1"}}); }), "WORLD_SIZE is not");
    CHECK_SAYS(raised([] { launched({{"RANK", "4"}, {"WORLD_SIZE", "4"}}); }), "RANK is '4'");
    CHECK_SAYS(raised([] { launched({{"RANK", "-1"}, {"WORLD_SIZE", "4"}}); }), "RANK is '-1'");
    CHECK_SAYS(raised([] { launched({{"RANK", "one"}, {"WORLD_SIZE", "4"}}); }), "RANK is 'one'");
    CHECK_SAYS(raised([] { launched({{"RANK", "0"}, {"WORLD_SIZE", "99999999999999"}}); }), "WORLD_SIZE is");
    CHECK_SAYS(raised([] { launched({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MDTRT_PORT", "70000"}}); }),
               "MDTRT_PORT is '70000'");
    CHECK_SAYS(raised([] { launched({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "65535"}}); }),
               "MASTER_PORT is '65535'");
}

TEST_CASE("several hosts need to be told where rank 0 is") {
    std::map<std::string, std::string> two = {
        {"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
    CHECK_SAYS(raised([&] { launched(two); }), "MASTER_ADDR");
    auto told = two;
    told["MASTER_ADDR"] = "host1";
    CHECK(launched(told).address == "host1");
    told = two;
    told["MDTRT_FILE"] = "/shared/x";
    CHECK(launched(told).file == "/shared/x");
    CHECK_SAYS(raised([] { launched({{"SLURM_PROCID", "1"}, {"SLURM_NTASKS", "4"}, {"SLURM_NNODES", "2"}}); }),
               "MASTER_ADDR");
}
