// What is remembered of every byte: its last writer and its last readers, each in one 64-bit record with the time at
// which it happened. Time goes on at every barrier, through the life of the process. So an access came before another
// thread's, and did not race with it, if it is older than the block's last barrier, or, in the same warp, than the
// warp's last one; and records older than the block, or than the launch, mean nothing without having been cleared.
#include "checker.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator.h"

#ifndef XLAYER_EMULATOR_HOOKS
#define XLAYER_EMULATOR_HOOKS 1
#endif

namespace xlayer::emulator {
namespace {

// --- Records ---------------------------------------------------------------------------------------------------------

// From the top: time 51 bits, thread 10, flags 3. Time 0: of a byte never touched.
using Record = uint64_t;
constexpr int kThreadShift = 3, kTimeShift = 13;
constexpr Record kInFlight = 1, kSplit = 2;                          // of a writer: its copy has not landed; see Page
constexpr Record kManyLanes = 1, kManyWarps = 2, kEarlierBlock = 4;  // of a reader: besides the thread it names

uint64_t time_of(Record record) { return record >> kTimeShift; }
int thread_of(Record record) { return static_cast<int>(record >> kThreadShift & (kMaxThreads - 1)); }
int warp_of(Record record) { return thread_of(record) / kLanes; }

// The last writer, and the readers since.
struct History {
    Record writer, reader;
};

// For one page of shared memory or of global memory. Most words are only ever accessed as a whole and have one history;
// where kSplit is all that a word's writer says, each of its bytes has its own. Many pages never touch `byte`.
constexpr size_t kPage = 4096, kWord = 4;
struct Page {
    History word[kPage / kWord], byte[kPage];
};

// --- State -----------------------------------------------------------------------------------------------------------

struct Region {
    uintptr_t begin;
    size_t bytes;
    bool writable;
    bool constant;  // no kernel may write any of it, so reading it races with nothing
    std::string name;

    bool holds(uintptr_t at, size_t size) const { return at - begin < bytes && size <= bytes - (at - begin); }
};

struct State {
    uint64_t time = 1;
    uint64_t launch_began = 1, block_began = 1, block_barrier = 1;  // the latest of each
    std::array<uint64_t, kMaxThreads / kLanes> warp_barrier{};      // may be older than the block's

    uintptr_t shared = 0;
    size_t shared_bytes = 0;

    // When the blocks of this launch began, and their numbers.
    std::vector<std::pair<uint64_t, uint64_t>> blocks;

    std::vector<Region> regions;
};
State state;

// This library as loaded: its constants, and variables such as threadIdx, are nobody's memory.
struct Image {
    uintptr_t begin = 0;
    size_t bytes = 0;

    Image() {
        dl_iterate_phdr(
            [](dl_phdr_info* module, size_t, void* out) {
                uintptr_t low = UINTPTR_MAX, high = 0;
                for (int i = 0; i < module->dlpi_phnum; ++i) {
                    const auto& segment = module->dlpi_phdr[i];
                    if (segment.p_type != PT_LOAD) continue;
                    low = std::min<uintptr_t>(low, module->dlpi_addr + segment.p_vaddr);
                    high = std::max<uintptr_t>(high, module->dlpi_addr + segment.p_vaddr + segment.p_memsz);
                }
                const auto here = reinterpret_cast<uintptr_t>(&state);
                if (here < low || here >= high) return 0;
                *static_cast<Image*>(out) = Image(low, high - low);
                return 1;
            },
            this);
    }
    Image(uintptr_t begin, size_t bytes) : begin(begin), bytes(bytes) {}
};
const Image image;

// --- Where records are -----------------------------------------------------------------------------------------------

// Pages come zeroed from the system, many at a time, and are used again by later launches.
class Pages {
  public:
    Page* find(uintptr_t number) {
        Entry& entry = recent_[number % recent_.size()];
        if (entry.number != number || entry.page == nullptr) entry = {number, find_or_add(number)};
        return entry.page;
    }

    // Gives memory back if there is much of it; only while no record matters.
    void trim() {
        if (slabs_.size() <= kMaxSlabs) return;
        for (Page* slab : slabs_) munmap(slab, kSlab * sizeof(Page));
        slabs_.clear();
        pages_.clear();
        recent_.fill({});
        used_ = kSlab;
    }

  private:
    static constexpr size_t kSlab = 64, kMaxSlabs = 64;  // 5 MiB each
    struct Entry {
        uintptr_t number;
        Page* page;
    };

    Page* find_or_add(uintptr_t number) {
        Page*& page = pages_[number];
        if (page != nullptr) return page;
        if (used_ == kSlab) {
            void* slab = mmap(nullptr, kSlab * sizeof(Page), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (slab == MAP_FAILED) fault("the checker finds no memory for its records", nullptr);
            slabs_.push_back(static_cast<Page*>(slab));
            used_ = 0;
        }
        return page = slabs_.back() + used_++;
    }

    std::unordered_map<uintptr_t, Page*> pages_;
    std::vector<Page*> slabs_;
    size_t used_ = kSlab;
    std::array<Entry, 512> recent_{};
};
Pages shared_pages, global_pages;  // by offset, by address

// The region of the last access from the same instruction: most touch one tensor only.
class RecentRegions {
  public:
    const Region*& of(const void* pc) { return at_[reinterpret_cast<uintptr_t>(pc) / 2 % at_.size()]; }
    void forget() { at_.fill(nullptr); }

  private:
    std::array<const Region*, 256> at_{};
};
RecentRegions recent_regions;

// --- Messages --------------------------------------------------------------------------------------------------------

enum class Kind { read, warp_read, write, copy };
const char* const kKindNames[] = {"read", "read by all lanes", "write", "asynchronous copy"};

struct Access {
    uintptr_t at;
    size_t bytes;
    Kind kind;
    const void* pc;

    bool writes() const { return kind == Kind::write || kind == Kind::copy; }
};

std::string count(uint64_t n, const char* what) { return std::to_string(n) + " " + what + (n == 1 ? "" : "s"); }

bool near_shared(uintptr_t at) { return at - (state.shared - kSharedGuard) < state.shared_bytes + 2 * kSharedGuard; }

// "write of 4 bytes at offset 16 of 1024 bytes of shared memory"
std::string describe(const Access& access) {
    std::string text = std::string(kKindNames[static_cast<int>(access.kind)]) + " of " + count(access.bytes, "byte");
    if (near_shared(access.at)) {
        const auto offset = static_cast<int64_t>(access.at - state.shared);
        return text + " at offset " + std::to_string(offset) + " of " + count(state.shared_bytes, "byte") +
               " of shared memory";
    }
    for (const Region& region : state.regions) {
        if (region.holds(access.at, access.bytes)) {
            return text + " at byte " + std::to_string(access.at - region.begin) + " of `" + region.name + "`";
        }
    }
    char address[32];
    snprintf(address, sizeof address, "%#zx", static_cast<size_t>(access.at));
    return text + " at address " + address;
}

// Of an access that no region holds: where it is, from the nearest.
std::string describe_outside(const Access& access) {
    const std::string text =
        std::string(kKindNames[static_cast<int>(access.kind)]) + " of " + count(access.bytes, "byte");
    const Region* nearest = nullptr;
    uintptr_t nearest_distance = 0;
    for (const Region& region : state.regions) {
        const uintptr_t end = region.begin + region.bytes;
        const uintptr_t distance = access.at < region.begin ? region.begin - access.at
                                   : access.at < end        ? 0
                                                            : access.at - end;
        if (nearest == nullptr || distance < nearest_distance) {
            nearest = &region;
            nearest_distance = distance;
        }
    }
    const std::string name = " `" + nearest->name + "`";
    const uintptr_t end = nearest->begin + nearest->bytes;
    if (access.at < nearest->begin) return text + ", " + count(nearest_distance, "byte") + " before" + name;
    if (access.at >= end) return text + ", " + count(nearest_distance, "byte") + " past the end of" + name;
    return text + ", the last " + std::to_string(access.at + access.bytes - end) + " of them past the end of" + name;
}

uint64_t block_of(Record record) {
    const auto after = std::upper_bound(state.blocks.begin(), state.blocks.end(),
                                        std::pair<uint64_t, uint64_t>(time_of(record), UINT64_MAX));
    return (after - 1)->second;
}

[[noreturn, gnu::cold]] void fault_unwritten(const Access& access) {
    fault(describe(access) + " before anything is written there", access.pc);
}

[[noreturn, gnu::cold]] void fault_in_flight(const Access& access, Record writer) {
    const bool own = thread_of(writer) == current_thread()->index;
    fault(describe(access) + " while an asynchronous copy of " +
              (own ? "its own" : "thread " + std::to_string(thread_of(writer))) +
              " to there is in flight (missing wait_copies)",
          access.pc);
}

[[noreturn]] void fault_race(const Access& access, const std::string& other, bool one_warp) {
    fault("race: " + describe(access) + " here, and " + other + " with no barrier between (missing " +
              (one_warp ? "sync_warp)" : "sync_block)"),
          access.pc);
}
[[noreturn, gnu::cold]] void fault_race_with_writer(const Access& access, Record writer) {
    fault_race(access, "a write by thread " + std::to_string(thread_of(writer)),
               warp_of(writer) == current_thread()->warp);
}
[[noreturn, gnu::cold]] void fault_race_with_reader(const Access& access, Record reader) {
    if (reader & kManyWarps) fault_race(access, "reads by several warps", false);
    const bool one_warp = warp_of(reader) == current_thread()->warp;
    if (reader & kManyLanes) fault_race(access, "reads by several lanes of one warp", one_warp);
    fault_race(access, "a read by thread " + std::to_string(thread_of(reader)), one_warp);
}

// `earlier`: the record of the other block, if there still is one.
[[noreturn, gnu::cold]] void fault_block_order(const Access& access, const Record* earlier, const char* did) {
    const uint64_t here = current_thread()->block;
    std::string blocks = "block " + std::to_string(here) + " and an earlier one depend";
    if (earlier != nullptr) {
        const uint64_t other = block_of(*earlier);
        blocks = "blocks " + std::to_string(std::min(here, other)) + " and " + std::to_string(std::max(here, other)) +
                 " depend";
    }
    fault(blocks + " on the order of blocks: " + describe(access) + ", which the other one " + did, access.pc);
}

// --- One history -----------------------------------------------------------------------------------------------------

// Who accesses: the record to leave, and whether all lanes of the warp do it at once.
struct Now {
    Record record;
    bool all_lanes;

    explicit Now(const Thread* thread, bool all_lanes = false)
        : record(state.time << kTimeShift | static_cast<Record>(thread->index) << kThreadShift), all_lanes(all_lanes) {}

    int thread() const { return thread_of(record); }
    int warp() const { return warp_of(record); }
};

// Of an earlier access by another thread of the block: whether a barrier of both lies between.
inline bool ordered(Record earlier, const Now& now) {
    return time_of(earlier) < state.block_barrier ||
           (warp_of(earlier) == now.warp() && time_of(earlier) < state.warp_barrier[now.warp()]);
}

// The last writer, before a read or a write.
template <bool shared>
inline void check_writer(Record writer, const Now& now, const Access& access) {
    if (time_of(writer) < state.block_began) {
        if (shared) {
            if (!access.writes()) fault_unwritten(access);
        } else if (time_of(writer) >= state.launch_began) {
            fault_block_order(access, &writer, "wrote");
        }
        return;
    }
    if (writer & kInFlight) fault_in_flight(access, writer);
    const bool itself = thread_of(writer) == now.thread() && !now.all_lanes;
    if (!itself && !ordered(writer, now)) fault_race_with_writer(access, writer);
}

// The last readers, before a write.
template <bool shared>
inline void check_readers(Record reader, const Now& now, const Access& access) {
    if (time_of(reader) < state.launch_began) return;
    if (!shared && time_of(reader) < state.block_began) fault_block_order(access, &reader, "read");
    if (!shared && (reader & kEarlierBlock)) fault_block_order(access, nullptr, "read");
    if (time_of(reader) < state.block_barrier) return;
    if (!(reader & kManyWarps)) {
        if (ordered(reader, now)) return;
        if (!(reader & kManyLanes) && thread_of(reader) == now.thread()) return;
    }
    fault_race_with_reader(access, reader);
}

// The readers to remember, of which `reader` are those so far. A later write races with one of them exactly if it races
// with what is kept: any second warp makes it race; of one warp, only reads since its last barrier can.
inline Record joined(Record reader, const Now& now) {
    const Record alone = now.record | (now.all_lanes ? kManyLanes : 0);
    if (time_of(reader) < state.launch_began) return alone;
    if (time_of(reader) < state.block_began) return alone | kEarlierBlock;
    if (time_of(reader) < state.block_barrier) return alone | (reader & kEarlierBlock);
    if (reader & kManyWarps) return reader;
    if (warp_of(reader) != now.warp()) return reader | kManyWarps;
    if (time_of(reader) < state.warp_barrier[now.warp()]) return alone | (reader & kEarlierBlock);
    const bool same = thread_of(reader) == now.thread() && !now.all_lanes;
    return same ? reader : reader | kManyLanes;
}

// --- One access ------------------------------------------------------------------------------------------------------

// What is written has been ordered after all earlier reads, so that they need not be remembered any longer.
template <bool shared>
inline void see_history(History& history, const Now& now, const Access& access) {
    check_writer<shared>(history.writer, now, access);
    if (access.writes()) {
        check_readers<shared>(history.reader, now, access);
        history = {now.record | (access.kind == Kind::copy ? kInFlight : 0), 0};
    } else {
        history.reader = joined(history.reader, now);
    }
}

template <bool shared>
inline void see_byte(Page* page, size_t at, const Now& now, const Access& access) {
    History& word = page->word[at / kWord];
    if (word.writer != kSplit) {
        std::fill_n(page->byte + at / kWord * kWord, kWord, word);
        word = {kSplit, 0};
    }
    see_history<shared>(page->byte[at], now, access);
}

template <bool shared>
void see_split_word(Page* page, size_t at, const Now& now, const Access& access) {
    const History* const byte = page->byte + at;
    bool same = true;
    for (size_t i = 0; i < kWord; ++i) {
        see_byte<shared>(page, at + i, now, access);
        same = same && byte[i].writer == byte[0].writer && byte[i].reader == byte[0].reader;
    }
    if (same) page->word[at / kWord] = byte[0];
}

template <bool shared>
inline void see_word(Page* page, size_t at, const Now& now, const Access& access) {
    History& word = page->word[at / kWord];
    if (word.writer == kSplit) return see_split_word<shared>(page, at, now, access);
    see_history<shared>(word, now, access);
}

// The access's bytes, of which the first is number `at` of those with records in `pages`. n: how many they are if the
// compiler knows, and only for speed.
template <size_t n, bool shared>
inline void see(Pages& pages, uintptr_t at, const Now& now, const Access& access) {
    if (n % kWord == 0 && access.bytes == n && at % n == 0) {  // in one page
        Page* const page = pages.find(at / kPage);
        for (size_t i = 0; i < n; i += kWord) see_word<shared>(page, at % kPage + i, now, access);
        return;
    }
    for (const uintptr_t end = at + access.bytes; at < end;) {
        Page* const page = pages.find(at / kPage);
        if (at % kWord == 0 && end - at >= kWord) {
            see_word<shared>(page, at % kPage, now, access);
            at += kWord;
        } else {
            see_byte<shared>(page, at % kPage, now, access);
            ++at;
        }
    }
}

const Region* find_region(const Access& access) {
    const Region* found = nullptr;
    for (const Region& region : state.regions) {
        if (!region.holds(access.at, access.bytes)) continue;
        if (!access.writes() || region.writable) return &region;
        found = &region;
    }
    if (found != nullptr) fault(describe(access) + ", which the kernel may only read", access.pc);
    fault("out of bounds: " + describe_outside(access), access.pc);
}

template <size_t n>
inline void check_shared(const Thread* thread, const Access& access) {
    const uintptr_t offset = access.at - state.shared;
    if (offset >= state.shared_bytes || access.bytes > state.shared_bytes - offset) {
        fault("out of bounds: " + describe(access), access.pc);
    }
    if (!XLAYER_EMULATOR_HOOKS) return;
    see<n, true>(shared_pages, offset, Now(thread, access.kind == Kind::warp_read), access);
}

template <size_t n>
inline void check_global(const Thread* thread, const Access& access) {
    if (!state.regions.empty()) {
        const Region*& recent = recent_regions.of(access.pc);
        if (recent == nullptr || !recent->holds(access.at, access.bytes) || (access.writes() && !recent->writable)) {
            recent = find_region(access);
        }
        if (recent->constant) return;
    } else if (access.at < kPage) {
        fault("out of bounds: " + describe(access) + ", a null pointer", access.pc);
    }
    if (!XLAYER_EMULATOR_HOOKS) return;
    see<n, false>(global_pages, access.at, Now(thread, access.kind == Kind::warp_read), access);
}

template <size_t n>
inline void check(const Access& access) {
    const Thread* const thread = current_thread();
    if (thread == nullptr) return;
    const auto stack = reinterpret_cast<uintptr_t>(thread->stack_begin);
    if (access.at - stack < reinterpret_cast<uintptr_t>(thread->stack_end) - stack) return;
    if (access.at - image.begin < image.bytes || access.bytes == 0) return;
    if (near_shared(access.at)) return check_shared<n>(thread, access);
    check_global<n>(thread, access);
}

void check_alignment(const Access& access, size_t alignment) {
    if (current_thread() == nullptr || access.at % alignment == 0) return;
    fault("misaligned: " + describe(access) + ", which must be a multiple of " + std::to_string(alignment), access.pc);
}

uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }

}  // namespace

// --- By the scheduler ------------------------------------------------------------------------------------------------

void launch_begins(const char*, int) {
    state.launch_began = state.block_began = state.block_barrier = ++state.time;
    state.blocks.clear();
}

void block_begins(uint64_t block, void* shared, size_t bytes) {
    state.shared = number(shared);
    state.shared_bytes = bytes;
    state.block_began = state.block_barrier = ++state.time;
    state.warp_barrier.fill(0);
    state.blocks.emplace_back(state.time, block);
}

void block_barrier_passed() { state.block_barrier = ++state.time; }

void warp_barrier_passed(int warp) { state.warp_barrier[warp] = ++state.time; }

void launch_ends() { global_pages.trim(); }

// --- By instructions -------------------------------------------------------------------------------------------------

void check_access(const void* address, size_t bytes, bool write, const void* pc, size_t alignment) {
    const Access access{number(address), bytes, write ? Kind::write : Kind::read, pc};
    check_alignment(access, alignment);
    check<16>(access);
}

void check_warp_read(const void* address, size_t bytes, const void* pc, size_t alignment) {
    const Access access{number(address), bytes, Kind::warp_read, pc};
    check_alignment(access, alignment);
    check<16>(access);
}

void copy_began(const void* shared, size_t bytes, const void* pc) {
    check<16>({number(shared), bytes, Kind::copy, pc});
}

void copy_landed(const void* shared, size_t bytes) {
    if (!XLAYER_EMULATOR_HOOKS) return;
    // Whole words, which nobody can have touched since the copy began.
    const Now now(current_thread());
    const uintptr_t offset = number(shared) - state.shared;
    for (uintptr_t at = offset; at < offset + bytes; at += kWord) {
        shared_pages.find(at / kPage)->word[at % kPage / kWord].writer = now.record;
    }
}

// --- Global memory ---------------------------------------------------------------------------------------------------

void allow_memory(const void* address, size_t bytes, bool writable, const char* name) {
    Region added{number(address), bytes, writable, !writable, name};
    for (Region& region : state.regions) {
        const bool overlap = region.begin < added.begin + bytes && added.begin < region.begin + region.bytes;
        if (overlap && writable) region.constant = false;
        if (overlap && region.writable) added.constant = false;
    }
    state.regions.push_back(std::move(added));
    recent_regions.forget();
}

void forget_memory() {
    state.regions.clear();
    recent_regions.forget();
}

}  // namespace xlayer::emulator

// --- What g++ calls --------------------------------------------------------------------------------------------------

#if XLAYER_EMULATOR_HOOKS

#pragma GCC visibility push(hidden)  // of no concern to other libraries of the process

namespace {

using xlayer::emulator::Kind;

template <size_t n>
inline void announced(const void* address, size_t bytes, Kind kind, const void* pc) {
    xlayer::emulator::check<n>({reinterpret_cast<uintptr_t>(address), bytes, kind, pc});
}

}  // namespace

#define XLAYER_HOOK(name, n, kind) \
    void __tsan_##name(void* address) { announced<n>(address, n, Kind::kind, __builtin_return_address(0)); }
#define XLAYER_HOOKS(n) XLAYER_HOOK(read##n, n, read) XLAYER_HOOK(write##n, n, write)

extern "C" {

XLAYER_HOOKS(1)
XLAYER_HOOKS(2)
XLAYER_HOOKS(4)
XLAYER_HOOKS(8)
XLAYER_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
    announced<16>(address, bytes, Kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
    announced<16>(address, bytes, Kind::write, __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}

// By -fsanitize=alignment: an access whose address its type's alignment does not divide.
struct TypeMismatch {
    struct {
        const char* file;
        uint32_t line, column;
    } where;
    const void* type;
    unsigned char log_alignment, what;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* mismatch, uintptr_t at) {
    const size_t alignment = size_t{1} << mismatch->log_alignment;
    const bool write = mismatch->what == 1;
    xlayer::emulator::check_alignment({at, alignment, write ? Kind::write : Kind::read, __builtin_return_address(0)},
                                      alignment);
}

}  // extern "C"

#pragma GCC visibility pop

#endif  // XLAYER_EMULATOR_HOOKS
