// Conversions and arithmetic of single elements against exact references.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "selftest.h"

namespace xlayer::selftest {
namespace {

float float_from(uint32_t bits) {
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
uint32_t bits_of(float x) {
    uint32_t out;
    memcpy(&out, &x, sizeof out);
    return out;
}

// A 16-bit format by its definition: what each pattern means.
struct Format {
    int mantissa_bits, bias;

    int infinity() const { return 0x7fff >> mantissa_bits << mantissa_bits; }
    double value(int pattern) const {
        const int magnitude = pattern & 0x7fff, exponent = magnitude >> mantissa_bits;
        const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
        const double sign = pattern & 0x8000 ? -1 : 1;
        if (magnitude > infinity()) return NAN;
        if (magnitude == infinity()) return sign * INFINITY;
        const int whole = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
        return sign * std::ldexp(whole, std::max(exponent, 1) - bias - mantissa_bits);
    }
};
constexpr Format kBfloat16{7, 127}, kFloat16{10, 15};

template <class T>
constexpr Format format_of() {
    return std::is_same_v<T, bfloat16> ? kBfloat16 : kFloat16;
}

template <class T>
T element(int pattern) {
    return {static_cast<uint16_t>(pattern)};
}

template <class T>
void widening(Random&) {
    for (int pattern = 0; pattern < 0x10000; ++pattern) {
        const double expected = format_of<T>().value(pattern);
        const float wide = widen(element<T>(pattern));
        const std::string what = "pattern " + std::to_string(pattern);
        if (std::isnan(expected)) {
            require(std::isnan(wide), what + " is not NaN");
            require_equal(int{narrow<T>(wide).bits}, 0x7fff, what + ", there and back,");
        } else {
            require(wide == expected && std::signbit(wide) == std::signbit(expected), what + " has another value");
            require_equal(int{narrow<T>(wide).bits}, pattern, what + ", there and back,");
        }
    }
}

// Between two neighbors: their middle, which goes to the even one, and the floats next to it.
template <class T>
void narrowing(Random& random) {
    constexpr Format format = format_of<T>();
    const auto require_narrow = [](float x, int pattern) {
        require_equal(int{narrow<T>(x).bits}, pattern, "narrow(" + std::to_string(x) + ")");
        require_equal(int{narrow<T>(-x).bits}, pattern | 0x8000, "narrow(" + std::to_string(-x) + ")");
    };
    for (int pattern = 0; pattern < format.infinity(); ++pattern) {
        const double low = format.value(pattern);
        // Above the largest number, what would be the next one if exponents went on.
        const double high =
            pattern + 1 < format.infinity() ? format.value(pattern + 1) : 2 * low - format.value(pattern - 1);
        const auto middle = static_cast<float>((low + high) / 2);
        require_narrow(middle, pattern % 2 == 0 ? pattern : pattern + 1);
        require_narrow(std::nextafter(middle, 0.0f), pattern);
        require_narrow(std::nextafter(middle, INFINITY), pattern + 1);
        const double between = low + (high - low) * (random.unit() + 1) / 2;
        const auto x = static_cast<float>(between);
        if (x != middle && !std::isinf(x)) require_narrow(x, x < middle ? pattern : pattern + 1);
    }
    require_narrow(INFINITY, format.infinity());
    require_narrow(std::numeric_limits<float>::max(), format.infinity());
}

void rounding_to_tf32(Random& random) {
    for (int i = 0; i < 200000; ++i) {
        const auto bits = static_cast<uint32_t>(random.bits());
        const float x = float_from(bits);
        const float rounded = float_from(to_tf32(x));
        if (std::isnan(x)) {
            require(std::isnan(float_from(to_tf32(x) & ~0x1fffu)), "NaN became a number");
            continue;
        }
        require_equal(to_tf32(x) & 0x1fff, 0u, "the lower part");
        if (std::isinf(x)) {
            require(rounded == x, "infinity changed");
            continue;
        }
        const double low = float_from(bits & ~0x1fffu);
        const double step = std::ldexp(1.0, std::max(std::ilogb(x), -126) - 10);
        const double offset = std::fabs(x) - std::fabs(low);
        const double expected = std::copysign(std::fabs(low) + (offset >= step / 2 ? step : 0), x);
        require(rounded == static_cast<float>(expected), "to_tf32(" + std::to_string(x) + ")");
    }
    require_equal(to_tf32(float_from(0x3f801000)), 0x3f802000u, "a tie, away from zero,");
    require_equal(to_tf32(float_from(0xbf801000)), 0xbf802000u, "a negative tie, away from zero,");
    require(std::isinf(float_from(to_tf32(std::numeric_limits<float>::max()))), "the largest float is too large");
}

void reciprocals(Random& random) {
    for (int i = 0; i < 200000; ++i) {
        const float x = float_from(static_cast<uint32_t>(random.bits()));
        const double expected = 1 / static_cast<double>(x), smallest = std::numeric_limits<float>::min();
        if (!std::isfinite(x) || std::fabs(x) < smallest || std::fabs(expected) < smallest) continue;
        require(std::fabs(reciprocal(x) - expected) <= std::ldexp(std::fabs(expected), -23),
                "reciprocal(" + std::to_string(x) + ")");
    }
    require_equal(reciprocal(INFINITY), 0.0f, "of infinity");
    require_equal(reciprocal(std::ldexp(1.0f, 127)), 0.0f, "what is too small for a normal number");
    require(std::isinf(reciprocal(0.0f)) && std::isnan(reciprocal(NAN)), "of 0 or NaN");
}

uint32_t pair_of(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

// An exact value: whole · 2^unit.
struct Exact {
    __extension__ __int128 whole;
    int unit;
};

// `x` rounded once, to nearest, ties to even.
double rounded(const Format& format, Exact x) {
    const bool negative = x.whole < 0;
    if (negative) x.whole = -x.whole;
    int top = -1;  // the exponent of its highest bit, in units
    for (auto rest = x.whole; rest != 0; rest >>= 1) ++top;
    const int least = 1 - format.bias - format.mantissa_bits;
    const int drop = std::max(std::max(top - format.mantissa_bits, least - x.unit), 0);
    auto kept = x.whole >> drop;
    const auto twice_lost = (x.whole - (kept << drop)) * 2;
    __extension__ const __int128 one = 1;
    if (twice_lost > one << drop || (twice_lost == one << drop && kept % 2 != 0)) kept += 1;
    double value = std::ldexp(static_cast<double>(kept), drop + x.unit);
    const double most = format.value(format.infinity() - 1);
    if (value > most) value = INFINITY;
    return negative ? -value : value;
}

template <class T>
void multiply_add(Random& random) {
    constexpr Format format = format_of<T>();
    // Whole numbers of these units are all that is drawn: of float16 everything, of bfloat16 what is neither tiny nor
    // huge, so that all sums fit in 128 bits.
    constexpr int unit = std::is_same_v<T, bfloat16> ? -27 : -24;
    const auto draw = [&] {
        if (std::is_same_v<T, float16>) return random.below(0x8000) < 0x7c00 ? random.below(0x7c00) : 0x8400;
        return (127 + random.between(-20, 20)) << 7 | random.below(128) | random.below(2) << 15;
    };
    const auto whole = [&](int pattern) { return static_cast<int64_t>(std::ldexp(format.value(pattern), -unit)); };
    for (int i = 0; i < 200000; ++i) {
        const int a = draw(), b = draw();
        int c = draw();
        if (i % 2 == 0) c = narrow<T>(static_cast<float>(-format.value(a) * format.value(b))).bits;  // cancellation
        if (std::fabs(std::ldexp(format.value(c), -unit)) >= 0x1p62) continue;
        if (std::ldexp(format.value(c), -unit) != static_cast<double>(whole(c))) continue;
        __extension__ __int128 sum = whole(a);
        sum *= whole(b);
        sum += static_cast<decltype(sum)>(whole(c)) * (int64_t{1} << -unit);
        const double expected = rounded(format, {sum, 2 * unit});
        const auto first = static_cast<uint16_t>(a), second = static_cast<uint16_t>(b),
                   third = static_cast<uint16_t>(c);
        const uint32_t got = pair_fma<T>(pair_of(first, 0), pair_of(second, first), pair_of(third, third));
        const double found = format.value(static_cast<int>(got & 0xffff));
        require(found == expected, "fma(" + std::to_string(format.value(a)) + ", " + std::to_string(format.value(b)) +
                                       ", " + std::to_string(format.value(c)) + ") is " + std::to_string(found) +
                                       ", not " + std::to_string(expected));
        require_equal(format.value(static_cast<int>(got >> 16)), format.value(c), "0 · a + c in the upper half");
    }
    // A product in the middle of two neighbors, pushed to either by the least number there is.
    const auto x = narrow<T>(1 + std::ldexp(1.0f, -format.mantissa_bits)).bits;  // x·1.5 lies in the middle
    const uint16_t y = narrow<T>(1.5f).bits;
    const uint32_t above = pair_fma<T>(x, y, 1), below = pair_fma<T>(x, y, 0x8001);
    require_equal((above & 0xffff) - (below & 0xffff), 1u, "what the least number decides");
    const auto is_nan = [&](uint32_t pair) { return std::isnan(format.value(static_cast<int>(pair & 0xffff))); };
    const auto infinity = static_cast<uint32_t>(format.infinity());
    require(is_nan(pair_fma<T>(infinity, 0, 0)), "infinity · 0 is a number");
    require(is_nan(pair_fma<T>(infinity, y, infinity | 0x8000)), "infinity − infinity is a number");
    require_equal(pair_fma<T>(infinity - 1, y, 0) & 0xffff, infinity, "the largest number times 1.5");
}

void counting(Random& random) {
    for (int i = 0; i < 1000; ++i) {
        const auto bits = static_cast<unsigned>(random.bits());
        int ones = 0;
        for (int bit = 0; bit < 32; ++bit) ones += bits >> bit & 1;
        require_equal(popcount(bits), ones, "count_ones");
    }
}

void packing(Random& random) {
    for (int i = 0; i < 1000; ++i) {
        const auto a = static_cast<float>(random.unit()), b = static_cast<float>(random.unit());
        const uint32_t pair = pack<bfloat16>(a, b);
        require_equal(pair & 0xffff, bits_of(widen(narrow<bfloat16>(a))) >> 16, "the low half");
        require_equal(widen(pair_element<bfloat16>(pair, 1)), widen(narrow<bfloat16>(b)), "the high half");
    }
}

const Registered all[] = {
    {"bfloat16 to float and back, all patterns", widening<bfloat16>},
    {"float16 to float and back, all patterns", widening<float16>},
    {"float to bfloat16, around every middle", narrowing<bfloat16>},
    {"float to float16, around every middle", narrowing<float16>},
    {"float to tf32", rounding_to_tf32},
    {"reciprocals", reciprocals},
    {"multiply-add of bfloat16 pairs", multiply_add<bfloat16>},
    {"multiply-add of float16 pairs", multiply_add<float16>},
    {"count_ones", counting},
    {"pack", packing},
};

}  // namespace
}  // namespace xlayer::selftest
