// The dropout mask of one row (docs/design.md, section 7), many Philox counters at once.
#pragma once
#include <cstdint>
#include <cstring>

#include "../attn/philox.h"

namespace flash_ext::cpu::FX_ISA {

inline constexpr int kPhiloxGroups =
    16;  // of eight keys; a loop over them is one the compiler vectorises

// bits[8 g + i] = the random 16 bits of key 8 (group0 + g) + i.
inline void dropout_bits(uint64_t seed, uint64_t offset, uint32_t batch_head, uint32_t query,
                         uint32_t group0, uint16_t (&bits)[8 * kPhiloxGroups]) {
  uint32_t word[4][kPhiloxGroups];
  for (int g = 0; g < kPhiloxGroups; ++g) {
    word[0][g] = group0 + g;
    word[1][g] = query;
    word[2][g] = batch_head;
    word[3][g] = uint32_t(offset);
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int g = 0; g < kPhiloxGroups; ++g) {
      const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * word[0][g];
      const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * word[2][g];
      word[0][g] = uint32_t(product1 >> 32) ^ word[1][g] ^ key0;
      word[1][g] = uint32_t(product1);
      word[2][g] = uint32_t(product0 >> 32) ^ word[3][g] ^ key1;
      word[3][g] = uint32_t(product0);
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  for (int g = 0; g < kPhiloxGroups; ++g)
    for (int w = 0; w < 4; ++w) {
      bits[8 * g + 2 * w] = uint16_t(word[w][g]);
      bits[8 * g + 2 * w + 1] = uint16_t(word[w][g] >> 16);
    }
}

// keep[begin, end) of the row whose key 0 is kv0: 0 where dropped, else kept.
template <typename S>
inline void fill_keep(const AttnParams& p, uint32_t batch_head, uint32_t query, int64_t kv0,
                      int begin, int end, S* keep) {
  const S kept = S(65536.0 / (65536.0 - p.dropout_threshold));
  const uint32_t threshold = p.dropout_threshold;
  constexpr int64_t kKeys = 8 * kPhiloxGroups;
  for (int64_t first = (kv0 + begin) / 8 * 8; first < kv0 + end; first += kKeys) {
    uint16_t bits[kKeys];
    dropout_bits(uint64_t(p.rng_state[0]), uint64_t(p.rng_state[1]), batch_head, query,
                 uint32_t(first / 8), bits);
    S block[kKeys];
    for (int i = 0; i < kKeys; ++i) block[i] = bits[i] < threshold ? S(0) : kept;
    const int64_t from = std::max<int64_t>(first, kv0 + begin),
                  to = std::min<int64_t>(first + kKeys, kv0 + end);
    std::memcpy(keep + (from - kv0), block + (from - first), size_t(to - from) * sizeof(S));
  }
}

}  // namespace flash_ext::cpu::FX_ISA
