// Registration with TVM's RPC tracker: this device, by key, whenever it has nothing to do.
#pragma once
#include <ctime>
#include <string>

#include "facts.h"
#include "wire.h"

namespace hwopt {

class Tracker {
 public:
  Tracker(std::string host, std::string port, std::string key, std::string address, int own_port)
      : host_(std::move(host)), port_(std::move(port)), key_(std::move(key)), address_(std::move(address)), own_port_(own_port) {}

  bool wanted() const { return !host_.empty(); }
  const std::string& match() const { return match_; }

  // Once a second or so: offer the device when it is idle; `served` says that somebody used the last offer.
  void tick(bool idle, bool served) {
    if (!wanted() || time(nullptr) < next_) return;
    next_ = time(nullptr) + 1;
    if (socket_ < 0 && !join()) return;
    std::string answer;
    if (!ask("[7]", answer)) return leave();  // GET_PENDING_MATCHKEYS
    bool pending = !match_.empty() && answer.find(json_text(match_)) != std::string::npos;
    if (pending || !idle) return void(missed_ = 0);
    if (!match_.empty() && !served && ++missed_ < 5) return;  // handed to a client that is on its way
    offer();
  }

 private:
  bool join() {
    const int32_t magic = 0x2F271;
    int32_t found = 0;
    std::string answer, address = address_.empty() ? "null" : json_text(address_);
    socket_ = open_socket(host_, port_, false);
    if (socket_ < 0) return next_ = time(nullptr) + 5, false;
    bool joined = write_all(socket_, &magic, 4) && read_all(socket_, &found, 4) && found == magic &&
                  ask("[5, {\"key\": " + json_text("server:" + key_) + ", \"addr\": [" + address + ", " + std::to_string(own_port_) +
                          "]}]", answer) && answer == "0";
    match_.clear();
    if (!joined) leave();
    return joined;
  }

  void offer() {
    std::string answer, address = address_.empty() ? "null" : json_text(address_);
    match_ = key_ + ":" + random_name();
    missed_ = 0;
    if (!ask("[3, " + json_text(key_) + ", [" + std::to_string(own_port_) + ", " + json_text(match_) + "], " + address + "]", answer) ||
        answer != "0")
      leave();
  }

  bool ask(const std::string& question, std::string& answer) {
    return write_text(socket_, question) && read_text(socket_, answer, 1 << 20);
  }

  void leave() {
    if (socket_ >= 0) close(socket_);
    socket_ = -1;
  }

  std::string host_, port_, key_, address_, match_;
  int own_port_, socket_ = -1, missed_ = 0;
  time_t next_ = 0;
};

}  // namespace hwopt
