#include "core/watchdog.h"

#include <atomic>
#include <thread>

#include "samples.h"

using namespace mdtrt;

namespace {

struct Ended {
    std::atomic<int> code{0};
    std::atomic<bool> aborted{false};
    Watchdog::Options options(double timeout) {
        Watchdog::Options options;
        options.timeout = timeout;
        options.abort = [this] { aborted = true; };
        options.end_process = [this](int found) { code = found; };
        return options;
    }
    bool within(double seconds) const {
        for (int i = 0; i < seconds * 100 && !code; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
        return code != 0;
    }
};

} // namespace

TEST_CASE("what is not done in time ends the process, after an abort") {
    Ended ended;
    Watchdog watchdog(ended.options(0.1));
    watchdog.watch([] { return false; }, "a test");
    REQUIRE(ended.within(20));
    CHECK(ended.code == kDeadline);
    CHECK(ended.aborted);
}

TEST_CASE("what is done in time does not, and the time of the next begins then") {
    Ended ended;
    Watchdog watchdog(ended.options(2));
    std::atomic<bool> first{false}, second{false};
    watchdog.watch([&] { return first.load(); }, "the first");
    watchdog.watch([&] { return second.load(); }, "the second");
    std::this_thread::sleep_for(std::chrono::milliseconds(1200));
    first = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1200));
    CHECK(ended.code == 0); // 2.4 s after it was handed over, and 1.2 after the first was done
    second = true;
    { Watchdog::Waiting waiting(watchdog, "a scope"); }
    CHECK(ended.code == 0);
}

TEST_CASE("a peer that ended ends a process that waits, and no other") {
    Ended ended;
    Watchdog watchdog(ended.options(1000));
    watchdog.peer_ended("rank 1 has ended.", 0.1);
    CHECK(!ended.within(0.5)); // it may be in a vote, which says who is missing
    watchdog.watch([] { return false; }, "a collective");
    REQUIRE(ended.within(20));
    CHECK(ended.code == kDeadline);
}

TEST_CASE("an abort that hangs does not keep the process") {
    Ended ended;
    auto options = ended.options(0.1);
    auto hung = std::make_shared<std::atomic<bool>>(true);
    options.abort = [hung] {
        while (*hung) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    };
    Watchdog watchdog(options);
    watchdog.watch([] { return false; }, "a test");
    CHECK(ended.within(40));
    *hung = false;
}

TEST_CASE("what a call may wait in is told as the collectives in order") {
    DType bf16 = dtype_of("bfloat16");
    Collective exchange{"all_to_all", "cp", 2, bf16, 64, 64}, gather{"all_gather", "cp", 2, bf16, 8, 8};
    Segment segment{"engine", "engines/x", "cp", {}, {}, {exchange, exchange, gather}, ""};
    Mesh mesh{{{"dp", 2}, {"cp", 2}}};
    std::string text = waits_for({segment}, mesh, 3);
    CHECK_SAYS(text, "segment 0 (engines/x) on axis 'cp' (ranks 2, 3)");
    CHECK_SAYS(text, "all_to_all of 64 x bfloat16, 2 times\n  all_gather of 8 x bfloat16");
    CHECK_SAYS(waits_for({}, mesh, 0), "without collectives");
}
