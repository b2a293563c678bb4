// A launch without GPUs: the ranks come together, vote and send bytes as mdtrt_run does, and one of them may fail.
//
//     mdtrt_launch_test TIMEOUT [FAULT RANK]
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <signal.h>
#include <thread>
#include <unistd.h>

#include "core/launch.h"
#include "core/rendezvous.h"
#include "core/watchdog.h"

namespace {

using namespace mdtrt;

void sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

void run(double timeout, const std::string& fault, int at, int wanted) {
    Launch launch = launch_from(process_environment, wanted);
    bool mine = launch.rank == at;
    if (mine && fault == "never") sleep(1000);
    if (mine && fault == "early") _exit(9);
    Rendezvous ranks(launch, timeout, timeout);
    std::atomic<bool> done{false};
    Watchdog::Options options;
    options.timeout = timeout;
    options.rank = ranks.rank();
    Watchdog watchdog(options);
    struct Told { // until the watchdog ends, which is before the rendezvous does
        Rendezvous& ranks;
        ~Told() { ranks.on_peer_ended(nullptr); }
    } told{ranks};
    ranks.on_peer_ended([&](const std::string& problem) { watchdog.peer_ended(problem, 1); });

    if (mine && fault == "killed") raise(SIGKILL);
    if (mine && fault == "stopped") raise(SIGSTOP);
    if (mine && fault == "hangs") sleep(1000);
    if (mine && fault == "differs") ranks.vote(nullptr, "another step");
    int work = ranks.together("a step", [&] {
        if (mine && fault == "fails") throw bundle_error("its bundle is damaged", "copy it");
        if (mine && fault == "throws") throw std::runtime_error("out of luck");
        if (mine && fault == "works") sleep(2 * timeout);
        return ranks.rank() * 10;
    });
    int sum = 0;
    for (const Json& value : ranks.gather(int64_t{work}, "a value")) sum += static_cast<int>(value.integer());
    std::vector<int64_t> sizes(ranks.size());
    for (int rank = 0; rank < ranks.size(); ++rank) sizes[rank] = int64_t{rank} * 3'000'000;
    size_t bytes = 0;
    for (const auto& part :
         ranks.collect(std::string(sizes[ranks.rank()], static_cast<char>('a' + ranks.rank())), sizes, "bytes")) {
        bytes += part.size();
        if (part.find_first_not_of(part.empty() ? 'a' : part[0]) != std::string::npos)
            throw launch_error("bytes of several ranks are mixed");
    }
    if (fault == "collective" || fault == "leaves") { // as a GPU waits for a peer that does not come
        if (mine && fault == "collective") raise(SIGKILL);
        if (mine) sleep(1000);
        watchdog.watch([&] { return done.load(); }, "a collective");
        sleep(1000);
    }
    for (int i = 0; i < 200; ++i) ranks.vote(nullptr, "a call");
    std::printf("rank %d of %d, local rank %d, by %s: %d, %zu bytes\n", ranks.rank(), ranks.size(), ranks.local_rank(),
                launch.launcher.c_str(), sum, bytes);
    ranks.leave();
}

} // namespace

int main(int argc, char** argv) {
    double timeout = argc > 1 ? std::atof(argv[1]) : 300;
    std::string fault = argc > 2 ? argv[2] : "";
    try {
        run(timeout, fault, argc > 3 ? std::atoi(argv[3]) : -1, 2);
    } catch (const Error& error) {
        std::fflush(stdout);
        std::fprintf(stderr, "%s: %s\n", error.kind.c_str(), error.what());
        return kFailed;
    }
    return 0;
}
