// hwopt-deviced: runs what hwopt uploads, over TVM's RPC, in one process per session. No Python.
//
// The protocol RUNS UPLOADED CODE with the rights of this process. It binds to loopback (reach it through `ssh -L`); another
// address needs --secret-file, which both ends prove by HMAC-SHA-256 of each other's random numbers before anything else is
// read. That proves who connects; it does not encrypt.
//
// A connection: [with a secret: proof] then either TVM's handshake (magic, "client:<key> -timeout=<seconds>") or a question
// (magic, "info" | "ended <serial>" | "end <serial>"), which is answered also while a session is at work. Sessions run one at a time.
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>

#include "facts.h"
#include "sha256.h"
#include "tracker.h"
#include "wire.h"

namespace ffi = tvm::ffi;
using namespace hwopt;

namespace {

const int32_t kSession = 0xff271, kMismatch = kSession + 2, kQuestion = 0x71b2a5;
const char kProof[] = "hwopt-auth-1\n";
const int kShake = 10, kQueue = 600, kGrace = 2, kMostConnections = 32;
const size_t kKept = 256;

struct Options {
  std::string host = "127.0.0.1", port = "9190", key = "hwopt", name, secret, work = "/tmp", tracker_host, tracker_port, address;
  long most = 3600;  // seconds of a session
};

struct Session {
  int serial, socket;
  time_t doomed;  // when it is killed, 0: not yet
  std::string why;
};

struct Server {
  Options options;
  std::string instance, folder;
  std::map<pid_t, Session> running;
  std::deque<std::pair<int, std::string>> ended;  // how the last sessions ended, by serial number
  int listener = -1, serials = 0;
};

volatile sig_atomic_t stopping = 0;

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "hwopt-deviced: error: %s\n", what.c_str());
  exit(2);
}

int remove_one(const char* path, const struct stat*, int, FTW*) { return remove(path); }

void remove_folder(const std::string& path) { nftw(path.c_str(), remove_one, 16, FTW_DEPTH | FTW_PHYS); }

// Folders of daemons that were killed: <work>/hwopt-device.<pid>.XXXXXX, ours, of no living process.
void remove_stale(const std::string& work) {
  DIR* folder = opendir(work.c_str());
  if (!folder) return;
  while (dirent* entry = readdir(folder)) {
    int pid = 0;
    struct stat about {};
    std::string path = work + "/" + entry->d_name;
    if (sscanf(entry->d_name, "hwopt-device.%d.", &pid) != 1 || lstat(path.c_str(), &about)) continue;
    if (S_ISDIR(about.st_mode) && about.st_uid == getuid() && kill(pid, 0) && errno == ESRCH) remove_folder(path);
  }
  closedir(folder);
}

// ------------------------------------------------------------------------------------------------ inside of a session

bool proven(int socket, const std::string& secret) {
  if (secret.empty()) return true;
  std::string mine = random_bytes(32), theirs(32, '\0'), proof(32, '\0');
  bool talked = write_all(socket, kProof, sizeof kProof - 1) && write_all(socket, mine.data(), 32) &&
                read_all(socket, &theirs[0], 32) && read_all(socket, &proof[0], 32);
  if (!talked || !same(proof, hmac(secret, "client" + mine + theirs))) return sleep(1), false;
  std::string answer = hmac(secret, "server" + mine + theirs);
  return write_all(socket, answer.data(), answer.size());
}

std::string answer(const Server& server, const std::string& question) {
  if (question == "info") return facts(server.options.name, server.options.key, server.instance);
  int serial = -1;
  if (sscanf(question.c_str(), "end %d", &serial) == 1) {
    for (const auto& one : server.running)
      if (one.second.serial == serial) kill(-one.first, SIGKILL);
    return server.instance;
  }
  if (sscanf(question.c_str(), "ended %d", &serial) != 1) return "";
  for (const auto& one : server.ended)
    if (one.first == serial) return server.instance + " " + one.second;
  for (const auto& one : server.running)
    if (one.second.serial == serial) return server.instance + " running";
  return server.instance + " unknown";
}

std::string inside(const std::string& name) {
  if (name.empty() || name[0] == '.' || name.find('/') != std::string::npos) throw std::runtime_error("not a plain file name");
  return name;
}

void serve(int socket, const std::string& folder, const std::string& session) {
  auto path = [folder](ffi::String name) { return ffi::String(folder + "/" + inside(std::string(name))); };
  ffi::Function::SetGlobal("tvm.rpc.server.workpath", ffi::Function::FromTyped(path), true);
  ffi::Function::SetGlobal("tvm.rpc.server.load_module", ffi::Function::FromTyped([path](ffi::String name) {
                             return ffi::Module::LoadFromFile(path(name));
                           }), true);
  ffi::Function::SetGlobal("hwopt.device.session", ffi::Function::FromTyped([session]() { return ffi::String(session); }), true);
  ffi::Function::GetGlobalRequired("rpc.ServerLoop")(socket);
}

bool shaken(int socket, const std::string& key, const std::string& match, const Server& server, long& seconds) {
  int32_t magic = 0;
  std::string said;
  if (!read_all(socket, &magic, 4) || (magic != kSession && magic != kQuestion) || !read_text(socket, said, 4096)) return false;
  if (magic == kQuestion) return write_text(socket, answer(server, said)), false;
  std::string head = said.substr(0, said.find(' '));
  if (head != "client:" + key && (match.empty() || head != "client:" + match)) return write_all(socket, &kMismatch, 4), false;
  size_t at = said.find("-timeout=");
  long asked = at == std::string::npos ? 0 : long(atof(said.c_str() + at + 9));
  seconds = asked > 0 ? std::min(asked, server.options.most) : server.options.most;
  return true;
}

// The process of one connection; never returns.
[[noreturn]] void session(const Server& server, const std::string& match, int socket, int serial) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // a killed daemon leaves nobody behind
  if (getppid() == 1) _exit(1);
  for (int which : {SIGTERM, SIGINT, SIGCHLD}) signal(which, SIG_DFL);
  rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);
  long seconds = 0;
  alarm(kShake);
  tend(socket);
  if (!proven(socket, server.options.secret) || !shaken(socket, server.options.key, match, server, seconds)) _exit(0);
  alarm(kQueue);
  int lock = open((server.folder + "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock < 0 || flock(lock, LOCK_EX)) _exit(1);  // one session at a time: two would disturb each other's times
  alarm(unsigned(seconds) + 1);
  const std::string folder = server.folder + "/" + std::to_string(serial);
  if (mkdir(folder.c_str(), 0700) || chdir(folder.c_str())) _exit(1);
  if (!write_all(socket, &kSession, 4) || !write_text(socket, "server:" + server.options.key)) _exit(0);
  try {
    serve(socket, folder, server.instance + " " + std::to_string(serial));
  } catch (const std::exception& error) {
    fprintf(stderr, "session %d: %s\n", serial, error.what());
    _exit(1);
  }
  _exit(0);
}

// ---------------------------------------------------------------------------------------------------------- the parent

void admit(Server& server, const std::string& match) {
  int socket = accept4(server.listener, nullptr, nullptr, SOCK_CLOEXEC);
  if (socket < 0) return;
  int serial = ++server.serials;
  pid_t pid = server.running.size() < size_t(kMostConnections) ? fork() : -1;
  if (pid == 0) {
    setpgid(0, 0);
    close(server.listener);
    session(server, match, socket, serial);
  }
  if (pid < 0) return void(close(socket));
  setpgid(pid, pid);
  server.running[pid] = {serial, socket, 0, ""};
}

std::string verdict(int status, const std::string& why) {
  if (!why.empty()) return why;
  if (WIFSIGNALED(status)) return WTERMSIG(status) == SIGALRM ? "timeout" : "signal " + std::to_string(WTERMSIG(status));
  return "exit " + std::to_string(WEXITSTATUS(status));
}

void reap(Server& server) {
  int status = 0;
  for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
    auto found = server.running.find(pid);
    if (found == server.running.end()) continue;
    kill(-pid, SIGKILL);  // whatever it started
    const Session& gone = found->second;
    std::string how = verdict(status, gone.why);
    if (how != "exit 0") printf("session %d ended: %s\n", gone.serial, how.c_str()), fflush(stdout);
    close(gone.socket);
    remove_folder(server.folder + "/" + std::to_string(gone.serial));
    server.ended.emplace_back(gone.serial, how);
    if (server.ended.size() > kKept) server.ended.pop_front();
    server.running.erase(found);
  }
}

// A client that left has its session ended, also one that hangs in a kernel.
void watch(Server& server, int milliseconds) {
  std::vector<pollfd> fds{{server.listener, POLLIN, 0}};
  std::vector<pid_t> pids{0};
  for (auto& one : server.running)
    if (!one.second.doomed) fds.push_back({one.second.socket, POLLRDHUP, 0}), pids.push_back(one.first);
  if (poll(fds.data(), fds.size(), milliseconds) < 0) return;
  time_t now = time(nullptr);
  for (size_t i = 1; i < fds.size(); ++i)
    if (fds[i].revents) server.running[pids[i]].doomed = now + kGrace;
  for (auto& one : server.running)
    if (one.second.doomed && now >= one.second.doomed && one.second.why.empty()) one.second.why = "hung", kill(-one.first, SIGKILL);
}

void run(Server& server, Tracker& tracker) {
  int seen = 0;
  std::string offered;
  while (!stopping) {
    pollfd fd{server.listener, POLLIN, 0};
    watch(server, server.running.empty() && !tracker.wanted() ? 5000 : 500);
    reap(server);
    if (poll(&fd, 1, 0) > 0) admit(server, tracker.match());
    tracker.tick(server.running.empty(), server.serials != seen);
    if (tracker.match() != offered) offered = tracker.match(), seen = server.serials;
  }
  for (auto& one : server.running) kill(-one.first, SIGKILL);
  remove_folder(server.folder);
}

Options parsed(int count, char** words) {
  Options options;
  std::map<std::string, std::string*> known = {{"--host", &options.host}, {"--port", &options.port}, {"--key", &options.key},
      {"--name", &options.name}, {"--work", &options.work}, {"--advertise", &options.address}};
  for (int i = 1; i < count; i += 2) {
    std::string word = words[i], value = i + 1 < count ? words[i + 1] : "";
    if (i + 1 >= count) fail(word + " needs a value");
    if (known.count(word)) *known[word] = value;
    else if (word == "--timeout") options.most = atol(value.c_str());
    else if (word == "--secret-file") {
      options.secret = first_line(value);
      if (options.secret.size() < 16) fail(value + ": the secret's line is missing or shorter than 16 characters");
    } else if (word == "--tracker") {
      size_t colon = value.rfind(':');
      if (colon == std::string::npos) fail("--tracker needs host:port");
      options.tracker_host = value.substr(0, colon), options.tracker_port = value.substr(colon + 1);
    } else fail("unknown option " + word);
  }
  if (options.most < 1) fail("--timeout needs seconds");
  if (options.key.find(' ') != std::string::npos) fail("a key has no blanks");
  return options;
}

}  // namespace

int main(int count, char** words) {
  Server server;
  server.options = parsed(count, words);
  if (server.options.name.empty()) server.options.name = model();
  bool loopback = false;
  server.listener = open_socket(server.options.host, server.options.port, true, &loopback);
  if (server.listener < 0) fail("cannot listen on " + server.options.host + ":" + server.options.port + ": " + strerror(errno));
  if (!loopback && server.options.secret.empty())
    fail(server.options.host + " is not loopback: whoever connects runs code here, so give --secret-file (or use ssh -L)");
  signal(SIGPIPE, SIG_IGN);
  struct sigaction stop {}, child {};
  stop.sa_handler = [](int) { stopping = 1; };
  child.sa_handler = [](int) {};  // wakes poll
  for (int which : {SIGTERM, SIGINT}) sigaction(which, &stop, nullptr);
  sigaction(SIGCHLD, &child, nullptr);
  remove_stale(server.options.work);
  std::string made = server.options.work + "/hwopt-device." + std::to_string(getpid()) + ".XXXXXX";
  if (!mkdtemp(&made[0])) fail("cannot make a folder in " + server.options.work + ": " + strerror(errno));
  server.folder = made, server.instance = random_name();
  int port = port_of(server.listener);
  Tracker tracker(server.options.tracker_host, server.options.tracker_port, server.options.key, server.options.address, port);
  printf("hwopt-deviced ready on %s port %d\n", server.options.host.c_str(), port), fflush(stdout);
  run(server, tracker);
  return 0;
}
