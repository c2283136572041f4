#include "report.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace xlayer::emulator {
namespace {

// Compilers name files as they were given: cuts off what this file's own name begins with.
std::string in_repository(const std::string& path) {
    static const std::string here = __FILE__, below = "tests/emulator/report.cpp";
    const size_t root = here.size() - below.size();
    return path.compare(0, root, here, 0, root) == 0 ? path.substr(root) : path;
}

std::string quoted(const std::string& argument) {
    std::string out = "'";
    for (const char c : argument) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return out + "'";
}

// Of the lines that were inlined into one another at an address, innermost first, the first of a kernel.
std::string kernel_line(FILE* lines) {
    std::string first;
    char line[4096];
    while (fgets(line, sizeof line, lines) != nullptr) {
        std::string place(line, strcspn(line, " \n"));  // " (discriminator 3)" may follow
        if (place.find(".cu:") != std::string::npos) return place;
        if (first.empty()) first = place;
    }
    return first;
}

const char* name_of(Operation operation) {
    switch (operation) {
        case Operation::sync_block:
            return "barrier";
        case Operation::sync_warp:
            return "warp barrier";
        case Operation::ballot:
            return "ballot";
        case Operation::shuffle:
            return "shuffle";
        case Operation::load_matrices:
            return "load_matrices";
        case Operation::load_matrices_transposed:
            return "load_matrices_transposed";
        case Operation::mma_16x8x16:
            return "mma_16x8x16";
        case Operation::mma_16x8x8_tf32:
            return "mma_16x8x8_tf32";
        case Operation::mma_8x8x4:
            return "mma_8x8x4";
    }
    return "";
}

// Threads that wait for the same.
struct Crowd {
    Operation operation;
    std::string line;
    int count;
    const Fiber* first;

    std::string place() const { return std::string(name_of(operation)) + " at " + line; }
};

std::vector<Crowd> crowds_of(const Warp* begin, const Warp* end) {
    std::vector<Crowd> crowds;
    for (const Warp* warp = begin; warp != end; ++warp) {
        for (const Fiber* lane = warp->lanes; lane != warp->lanes + warp->count; ++lane) {
            if (lane->state != State::waiting) continue;
            const std::string line = describe(lane->waits_at);
            const auto same = std::find_if(crowds.begin(), crowds.end(), [&](const Crowd& crowd) {
                return crowd.operation == lane->waits_in && crowd.line == line;
            });
            if (same != crowds.end()) {
                ++same->count;
            } else {
                crowds.push_back({lane->waits_in, line, 1, lane});
            }
        }
    }
    // The barrier of the block first: it is what the others should have come to.
    std::stable_sort(crowds.begin(), crowds.end(),
                     [](const Crowd& a, const Crowd& b) { return a.operation < b.operation; });
    return crowds;
}

std::string others(const std::vector<Crowd>& crowds) {
    std::string text = ", the others wait in ";
    for (size_t i = 1; i < crowds.size(); ++i) text += (i > 1 ? ", " : "") + crowds[i].place();
    return text;
}

// All lanes that are left of a warp came to the same, but it takes 32.
Deadlock explain_missing_lanes(const Warp& warp, const Crowd& crowd) {
    std::string text = crowd.place() + " reached by " + std::to_string(crowd.count) + " of " + std::to_string(kLanes) +
                       " lanes of warp " + std::to_string(crowd.first->warp);
    if (warp.count < kLanes) return {text + ", which has no more", crowd.first};
    const Fiber* gone = std::find_if(warp.lanes, warp.lanes + warp.count,
                                     [](const Fiber& lane) { return lane.state == State::exited; });
    const int others = kLanes - crowd.count - 1;
    text += ", lane " + std::to_string(gone->lane);
    if (others > 0) text += " and " + std::to_string(others) + " more";
    return {text + (others > 0 ? " have exited" : " has exited"), crowd.first};
}

}  // namespace

std::string describe(Site site) { return in_repository(site.file) + ":" + std::to_string(site.line); }

std::string source_line(const void* pc) {
    Dl_info module;
    if (dladdr(pc, &module) == 0 || module.dli_fbase == nullptr) return "unknown line";
    const char* call = static_cast<const char*>(pc) - 1;  // pc is where the call returns to
    const auto* header = static_cast<const ElfW(Ehdr)*>(module.dli_fbase);
    const char* zero = header->e_type == ET_EXEC ? nullptr : static_cast<const char*>(module.dli_fbase);
    char address[32];
    snprintf(address, sizeof address, "%#tx", call - zero);
    const std::string command = "addr2line -i -e " + quoted(module.dli_fname) + " " + address + " 2>/dev/null";
    std::string line;
    if (FILE* lines = popen(command.c_str(), "r")) {
        line = kernel_line(lines);
        pclose(lines);
    }
    if (line.empty() || line[0] == '?') return std::string(module.dli_fname) + "+" + address;
    return in_repository(line);
}

Deadlock explain_deadlock(const std::vector<Warp>& warps) {
    for (const Warp& warp : warps) {
        if (warp.live == 0) continue;
        const std::vector<Crowd> crowds = crowds_of(&warp, &warp + 1);
        const bool needs_all =
            crowds[0].operation != Operation::sync_block && crowds[0].operation != Operation::sync_warp;
        if (crowds.size() == 1 && needs_all) return explain_missing_lanes(warp, crowds[0]);
    }
    const std::vector<Crowd> crowds = crowds_of(warps.data(), warps.data() + warps.size());
    int live = 0;
    for (const Warp& warp : warps) live += warp.live;
    std::string text;
    if (crowds.back().operation == Operation::sync_block) text = "divergent barrier: ";
    text += crowds[0].place() + " reached by " + std::to_string(crowds[0].count) + " of " + std::to_string(live) +
            " live threads";
    return {text + others(crowds), crowds[0].first};
}

}  // namespace xlayer::emulator
