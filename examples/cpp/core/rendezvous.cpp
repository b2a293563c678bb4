#include "core/rendezvous.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <optional>
#include <poll.h>
#include <set>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

#include "core/text.h"

namespace mdtrt {
namespace {

const char* const kProtocol = "mdtrt 1";
const char* const kAnother = "another launch listens there";
constexpr double kBeat = 0.5;         // seconds between two signs of work
constexpr double kHandshake = 30;     // seconds that a stranger has to say who it is
constexpr size_t kMessage = 64 << 20; // bytes of a message between ranks
constexpr size_t kChunk = 1 << 20;

SteadyClock::time_point after(double seconds) {
    return SteadyClock::now() + std::chrono::duration_cast<SteadyClock::duration>(Seconds(seconds));
}

double since(SteadyClock::time_point start) { return Seconds(SteadyClock::now() - start).count(); }

void pause(double seconds) { std::this_thread::sleep_for(Seconds(seconds)); }

std::string host_name() {
    char name[256] = {};
    gethostname(name, sizeof name - 1);
    return name;
}

std::string number_text(double seconds) {
    char text[40];
    std::snprintf(text, sizeof text, "%g", seconds);
    return text;
}

std::string random_token() {
    char bytes[16];
    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) throw std::system_error(errno, std::generic_category());
    return hex({bytes, sizeof bytes});
}

} // namespace

// `by` is the rank that wrote it: where it is another one, that gave this one up, and `about` says how.
struct Rendezvous::Ballot {
    int64_t by;
    std::string about;
    std::optional<Error> failure;
    Json value;

    std::string text() const {
        Json error = nullptr;
        if (failure) error = Json::Array{failure->kind, failure->problem, failure->fix};
        return Json(Json::Array{by, about, std::move(error), value}).text();
    }
    // Raises std::runtime_error: it is none.
    static Ballot of(const Json& json) {
        const auto& parts = json.array();
        if (parts.size() != 4) throw std::runtime_error("it is no ballot");
        Ballot ballot{parts[0].integer(), parts[1].string(), std::nullopt, parts[3]};
        if (!parts[2].is_null()) {
            const auto& error = parts[2].array();
            if (error.size() != 3) throw std::runtime_error("it is no error");
            ballot.failure.emplace(error[0].string(), error[1].string(), error[2].string());
        }
        return ballot;
    }
};

Rendezvous::Rendezvous(Launch launch, double timeout, double grace)
    : launch_(std::move(launch)),
      timeout_(timeout),
      grace_(grace) {
    if (!(timeout > 0))
        throw launch_error("a timeout of " + number_text(timeout) + " s leaves no time to agree",
                           "give seconds, more than 0");
    peers_.resize(rank() == 0 ? size() : 1);
    for (auto& peer : peers_) peer.heard = SteadyClock::now();
    if (size() > 1) {
        if (rank() == 0)
            listen();
        else
            join();
        thread_ = std::thread([this] { run(); });
    }
    try {
        for (const Json& host : gather(host_name(), "the start of the launch")) hosts_.push_back(host.string());
    } catch (...) {
        close();
        throw;
    }
    if (accepting_.exchange(false) && !launch_.file.empty()) std::remove(launch_.file.c_str());
    int among = static_cast<int>(std::count(hosts_.begin(), hosts_.begin() + rank(), hosts_[rank()]));
    local_rank_ = launch_.local_rank.value_or(among);
}

Rendezvous::~Rendezvous() { close(); }

void Rendezvous::close() {
    if (!thread_.joinable()) return;
    // What was sent last must arrive: nothing is closed before the others have closed, or a moment has passed.
    for (auto& peer : peers_)
        if (peer.connection) peer.connection->finish();
    {
        std::unique_lock<std::mutex> lock(mutex_);
        leaving_ = true;
        changed_.wait_until(lock, after(1), [&] {
            return std::none_of(peers_.begin(), peers_.end(),
                                [](const Peer& p) { return p.connection && p.connection->open; });
        });
    }
    closing_ = true;
    thread_.join();
}

void Rendezvous::on_peer_ended(std::function<void(std::string)> told) {
    std::lock_guard<std::mutex> lock(mutex_);
    told_ = std::move(told);
    if (told_ && !first_loss_.empty()) told_(first_loss_);
}

void Rendezvous::vote(const Error* error, const std::string& about) {
    exchange({rank(), about, error ? std::optional<Error>(*error) : std::nullopt, nullptr});
}

void Rendezvous::together_(const std::string& about, const std::function<void()>& step) {
    struct Working {
        std::atomic<int>& count;
        explicit Working(std::atomic<int>& count) : count(count) { ++count; }
        ~Working() { --count; }
    };
    std::optional<Error> error;
    try {
        Working working(working_);
        step();
    } catch (const Error& own) {
        if (own.agreed) throw; // by a vote within the step, in which all ranks were
        error = own;
    } catch (const std::exception& other) { // whatever it is, the others must not wait for it
        error = launch_error(about + " failed: " + other.what());
    }
    vote(error ? &*error : nullptr, about);
}

std::vector<Json> Rendezvous::gather(const Json& value, const std::string& about) {
    std::vector<Json> values;
    for (auto& ballot : exchange({rank(), about, std::nullopt, value})) values.push_back(std::move(ballot.value));
    return values;
}

std::vector<std::string> Rendezvous::collect(std::string_view mine, const std::vector<int64_t>& sizes,
                                             const std::string& about) {
    if (rank() == 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        for (int r = 1; r < size(); ++r) {
            peers_[r].data.clear();
            peers_[r].data_size = sizes[r];
        }
    }
    vote(nullptr, about);
    if (rank() != 0) {
        ++working_;
        bool sent = true;
        for (size_t at = 0; sent && at < mine.size(); at += kChunk)
            sent = peers_[0].connection->send(Type::data, mine.substr(at, kChunk));
        --working_;
        vote(nullptr, about + ", which were sent");
        return {};
    }
    vote(nullptr, about + ", which were sent");
    std::vector<std::string> all(size());
    all[0] = mine;
    std::lock_guard<std::mutex> lock(mutex_);
    for (int r = 1; r < size(); ++r) {
        if (static_cast<int64_t>(peers_[r].data.size()) != sizes[r])
            throw launch_error("rank " + std::to_string(r) + " sent " + std::to_string(peers_[r].data.size()) +
                               " bytes of " + about + ", and has " + std::to_string(sizes[r]));
        all[r] = std::move(peers_[r].data);
    }
    return all;
}

void Rendezvous::leave() {
    vote(nullptr, "the end of the run");
    std::lock_guard<std::mutex> lock(mutex_);
    leaving_ = true;
    for (auto& peer : peers_)
        if (peer.connection) peer.connection->send(Type::bye, "");
}

// Votes -------------------------------------------------------------------------------------------------------------

std::vector<Rendezvous::Ballot> Rendezvous::exchange(const Ballot& mine) {
    std::string text;
    if (size() == 1)
        text = "[" + mine.text() + "]";
    else
        text = rank() == 0 ? verdict_of_all(mine) : verdict_of_rank_0(mine);
    ++number_;
    std::vector<Ballot> ballots;
    try {
        Json all = Json::parse(text);
        for (const Json& ballot : all.array()) ballots.push_back(Ballot::of(ballot));
        if (static_cast<int>(ballots.size()) != size()) throw std::runtime_error("a vote of another number of ranks");
    } catch (const std::runtime_error& broken) {
        throw launch_error("what came of the vote on " + mine.about + " is not understood: " + broken.what());
    }

    // All ranks read the same ballots, and so come to the same end.
    auto agreed = [](Error found) {
        found.agreed = true;
        return found;
    };
    std::vector<std::pair<Error, std::vector<int>>> failures;
    std::string lost;
    std::vector<int> lost_ranks;
    for (int r = 0; r < size(); ++r) {
        const Ballot& ballot = ballots[r];
        if (ballot.by != r) {
            lost += (lost.empty() ? "" : "; ") + ("rank " + std::to_string(r)) + " " + ballot.about;
            lost_ranks.push_back(r);
        } else if (ballot.failure) {
            auto same = std::find_if(failures.begin(), failures.end(), [&](const auto& other) {
                return other.first.kind == ballot.failure->kind && other.first.problem == ballot.failure->problem &&
                       other.first.fix == ballot.failure->fix;
            });
            if (same == failures.end())
                failures.push_back({*ballot.failure, {r}});
            else
                same->second.push_back(r);
        }
    }
    if (!failures.empty()) {
        std::string problem, fixes, kind = failures[0].first.kind;
        std::set<std::string> seen;
        for (const auto& [failure, ranks] : failures) {
            if (failure.kind != kind) kind = "LaunchError";
            problem += (problem.empty() ? "" : "\n") + (size() == 1 ? "" : ranks_named(ranks, size()) + ": ") +
                       failure.problem;
            if (!failure.fix.empty() && seen.insert(failure.fix).second)
                fixes += (fixes.empty() ? "" : "; ") + failure.fix;
        }
        throw agreed(Error(kind, problem, fixes));
    }
    if (!lost_ranks.empty())
        throw agreed(launch_error(lost, "see the output of " + ranks_named(lost_ranks, 0) +
                                            ": it has failed, has ended, or does not make this call"));
    for (const Ballot& ballot : ballots)
        if (ballot.about != ballots[0].about)
            throw agreed(launch_error("the ranks are at different steps: rank 0 at " + in_quotes(ballots[0].about) +
                                          ", rank " + std::to_string(&ballot - ballots.data()) + " at " +
                                          in_quotes(ballot.about),
                                      "make the same calls, in the same order, on every rank"));
    return ballots;
}

std::string Rendezvous::verdict_of_all(const Ballot& mine) {
    auto start = SteadyClock::now();
    ++working_; // the others wait for this rank, which waits for another
    std::string verdict = "[" + mine.text();
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        bool complete = true;
        for (int r = 1; r < size(); ++r) {
            Peer& peer = peers_[r];
            if (peer.ballots.count(number_)) continue;
            std::string problem;
            if (!peer.lost.empty())
                problem = peer.lost + " before it came to " + mine.about;
            else if (since(std::max(peer.heard, start)) > timeout_)
                problem = "did not come to " + mine.about + " within " + number_text(timeout_) + " s";
            if (problem.empty())
                complete = false;
            else
                peer.ballots[number_] = Ballot{0, problem, std::nullopt, nullptr}.text();
        }
        if (complete) break;
        changed_.wait_until(lock, after(std::min(0.05, timeout_ / 10)));
    }
    for (int r = 1; r < size(); ++r) {
        verdict += "," + peers_[r].ballots[number_];
        peers_[r].ballots.erase(number_);
    }
    verdict += "]";
    std::vector<std::shared_ptr<Connection>> others;
    for (auto& peer : peers_)
        if (peer.connection && peer.lost.empty()) others.push_back(peer.connection);
    lock.unlock();
    for (auto& other : others) other->send(Type::verdict, verdict);
    --working_;
    return verdict;
}

std::string Rendezvous::verdict_of_rank_0(const Ballot& mine) {
    Peer& zero = peers_[0];
    auto start = SteadyClock::now();
    zero.connection->send(Type::ballot, Json(Json::Array{number_.load(), mine.text()}).text());
    std::unique_lock<std::mutex> lock(mutex_);
    while (!zero.ballots.count(number_)) {
        if (!zero.lost.empty())
            throw launch_error("rank 0 " + zero.lost + " before the vote on " + mine.about + " was over",
                               "see the output of rank 0: it has failed or ended");
        if (since(std::max(zero.heard, start)) > timeout_ + grace_)
            throw launch_error("rank 0 was silent for " + number_text(timeout_ + grace_) + " s in the vote on " +
                                   mine.about,
                               "see the output of rank 0: it hangs, or does not make this call");
        changed_.wait_until(lock, after(0.05));
    }
    std::string verdict = std::move(zero.ballots[number_]);
    zero.ballots.erase(number_);
    return verdict;
}

// Coming together ---------------------------------------------------------------------------------------------------

std::string Rendezvous::hello(const std::string& token) const {
    return Json(Json::Array{kProtocol, static_cast<int64_t>(rank()), static_cast<int64_t>(size()), launch_.job, token})
        .text();
}

void Rendezvous::listen() {
    try {
        listener_ = std::make_unique<Listener>(launch_.file.empty() ? launch_.address : "",
                                               launch_.file.empty() ? launch_.port : 0);
    } catch (const std::system_error& error) {
        if (error.code().value() == EADDRINUSE)
            throw launch_error("rank 0 cannot listen: port " + std::to_string(launch_.port) + " (" + launch_.port_from +
                                   ") is in use on " + host_name(),
                               "set MDTRT_PORT to a port that is free there, the same on every rank");
        throw launch_error("rank 0 cannot listen on " + launch_.address + ":" + std::to_string(launch_.port) + ": " +
                               error.code().message(),
                           "set MASTER_ADDR to the host of rank 0, and MDTRT_PORT to a port that is free there");
    }
    accepting_ = true;
    if (launch_.file.empty()) return;
    // Written aside and renamed: nobody reads half of it.  An old one leads nowhere, and is read again.
    token_ = random_token();
    std::string aside = launch_.file + "." + token_;
    std::ofstream file(aside);
    chmod(aside.c_str(), 0600);
    file << kProtocol << " " << token_ << " " << host_name() << " " << listener_->port() << "\n";
    file.close();
    if (!file || std::rename(aside.c_str(), launch_.file.c_str())) {
        std::remove(aside.c_str());
        throw launch_error("rank 0 cannot write " + launch_.file + ": " + std::strerror(errno),
                           "let MDTRT_FILE be a path that every rank can read and rank 0 can write");
    }
}

void Rendezvous::join() {
    double limit = timeout_ + grace_;
    auto start = SteadyClock::now();
    std::string refused, where = launch_.address + ":" + std::to_string(launch_.port) + " (" + launch_.port_from + ")";
    while (true) {
        std::string host = launch_.address, token;
        int port = launch_.port;
        if (!launch_.file.empty()) {
            where = "the place that " + launch_.file + " names";
            std::ifstream file(launch_.file);
            std::string name, version;
            if (!(file >> name >> version >> token >> host >> port) || name + " " + version != kProtocol) port = 0;
            if (host == host_name()) host = "localhost";
        }
        double left = limit - since(start);
        if (port > 0 && left > 0) peers_[0].connection = joined(host, port, token, left, refused);
        if (peers_[0].connection) break;
        if (since(start) > limit)
            throw launch_error("rank " + std::to_string(rank()) + " did not find rank 0 at " + where + " within " +
                                   number_text(limit) + " s" + (refused.empty() ? "" : ": " + refused),
                               "see the output of rank 0; MASTER_ADDR and MDTRT_PORT say where it listens");
        pause(std::min(0.1, timeout_ / 10));
    }
    peers_[0].connection->most = kMessage;
    peers_[0].heard = SteadyClock::now();
}

std::shared_ptr<Connection> Rendezvous::joined(const std::string& host, int port, const std::string& token,
                                               double seconds, std::string& refused) {
    std::shared_ptr<Connection> connection = connect_to(host, port, std::min(seconds, 5.0), timeout_);
    if (!connection || !connection->send(Type::hello, hello(token))) return nullptr;
    auto deadline = after(std::min(seconds, kHandshake));
    while (connection->open && SteadyClock::now() < deadline) {
        pollfd waiting{connection->descriptor(), POLLIN, 0};
        poll(&waiting, 1, 50);
        // Rank 0 sends nothing behind its welcome before this rank has voted.
        for (const Message& message : connection->receive()) {
            if (message.type == Type::welcome) return connection;
            if (message.type == Type::refuse) {
                if (message.body != kAnother)
                    throw launch_error("rank 0 refused rank " + std::to_string(rank()) + ": " + message.body,
                                       "start each rank of the launch once, all with the same number of ranks");
                refused = message.body; // that one may end, and ours begin
                return nullptr;
            }
        }
    }
    return nullptr;
}

// The other thread --------------------------------------------------------------------------------------------------

void Rendezvous::run() {
    std::vector<Stranger> strangers;
    auto beaten = SteadyClock::now();
    while (!closing_) {
        std::vector<pollfd> descriptors;
        std::vector<std::pair<int, std::shared_ptr<Connection>>> connections;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (size_t i = 0; i < peers_.size(); ++i)
                if (peers_[i].connection && peers_[i].connection->open)
                    connections.emplace_back(static_cast<int>(i), peers_[i].connection);
        }
        for (auto& connection : connections) descriptors.push_back({connection.second->descriptor(), POLLIN, 0});
        for (auto& stranger : strangers) descriptors.push_back({stranger.connection->descriptor(), POLLIN, 0});
        if (accepting_) descriptors.push_back({listener_->descriptor(), POLLIN, 0});
        poll(descriptors.data(), descriptors.size(), 50);
        for (size_t i = 0; i < connections.size(); ++i) {
            if (!descriptors[i].revents) continue;
            auto& [from, connection] = connections[i];
            for (const Message& message : connection->receive()) hear(from, message);
            if (!connection->open) lose(from, "ended");
        }
        if (accepting_)
            welcome(strangers);
        else if (listener_) {
            listener_.reset();
            strangers.clear();
        }
        if (working_ && since(beaten) > std::min(kBeat, timeout_ / 4)) {
            beaten = SteadyClock::now();
            for (auto& connection : connections) connection.second->send(Type::beat, "");
        }
    }
}

void Rendezvous::welcome(std::vector<Stranger>& strangers) {
    for (int fd = listener_->accept(); fd >= 0; fd = listener_->accept())
        strangers.push_back({std::make_shared<Connection>(fd, timeout_), SteadyClock::now()});
    for (size_t i = 0; i < strangers.size();) {
        Stranger stranger = strangers[i];
        auto messages = stranger.connection->receive();
        bool done = !stranger.connection->open || since(stranger.since) > kHandshake;
        if (!messages.empty()) done = greet(stranger, messages[0].type == Type::hello ? messages[0].body : "");
        if (done)
            strangers.erase(strangers.begin() + static_cast<std::ptrdiff_t>(i));
        else
            ++i;
    }
}

// Whether the stranger is dealt with: it is a rank now, or was refused.
bool Rendezvous::greet(const Stranger& stranger, const std::string& text) {
    int64_t other = -1;
    std::string problem;
    try {
        Json json = Json::parse(text);
        const auto& parts = json.array();
        if (parts.size() != 5 || parts[0].string() != kProtocol) return true; // no rank of ours
        other = parts[1].integer();
        if (parts[3].string() != launch_.job || parts[4].string() != token_)
            problem = kAnother;
        else if (parts[2].integer() != size())
            problem = "rank 0 is in a launch of " + std::to_string(size()) + " ranks, and not of " +
                      std::to_string(parts[2].integer());
        else if (other < 1 || other >= size())
            problem = "there is no rank " + std::to_string(other);
    } catch (const std::runtime_error&) { return true; }
    std::lock_guard<std::mutex> lock(mutex_);
    if (problem.empty() && peers_[other].connection) problem = "there is a rank " + std::to_string(other) + " already";
    if (!problem.empty()) {
        stranger.connection->send(Type::refuse, problem);
        return true;
    }
    stranger.connection->most = kMessage;
    peers_[other].connection = stranger.connection;
    peers_[other].heard = SteadyClock::now();
    stranger.connection->send(Type::welcome, "");
    return true;
}

void Rendezvous::hear(int from, const Message& message) {
    std::lock_guard<std::mutex> lock(mutex_);
    Peer& peer = peers_[from];
    peer.heard = SteadyClock::now();
    try {
        if (message.type == Type::verdict && rank() != 0) {
            peer.ballots[number_] = message.body;
        } else if (message.type == Type::ballot && rank() == 0) {
            Json json = Json::parse(message.body);
            const auto& parts = json.array();
            Ballot::of(Json::parse(parts.at(1).string())); // that it is one
            peer.ballots.emplace(parts.at(0).integer(), parts[1].string());
        } else if (message.type == Type::data && rank() == 0) {
            if (static_cast<int64_t>(peer.data.size() + message.body.size()) > peer.data_size)
                throw std::runtime_error("more than it has");
            peer.data += message.body;
        } else if (message.type == Type::ended) {
            if (first_loss_.empty()) {
                first_loss_ = message.body;
                if (told_) told_(first_loss_);
            }
        } else if (message.type == Type::bye) {
            peer.left = true;
        }
    } catch (const std::exception&) {
        peer.connection->open = false; // it does not speak our language any more
    }
    changed_.notify_all();
}

void Rendezvous::lose(int from, const std::string& how) {
    std::lock_guard<std::mutex> lock(mutex_);
    Peer& peer = peers_[from];
    changed_.notify_all();
    if (!peer.lost.empty()) return;
    peer.lost = how;
    if (peer.left || leaving_) return;
    std::string problem = "rank " + std::to_string(rank() == 0 ? from : 0) + " has ended.";
    for (auto& other : peers_)
        if (rank() == 0 && other.connection && other.lost.empty()) other.connection->send(Type::ended, problem);
    if (!first_loss_.empty()) return;
    first_loss_ = problem;
    if (told_) told_(problem);
}

} // namespace mdtrt
