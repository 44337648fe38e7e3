// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3" (SC 2011), and the dropout mask made from it (docs/design.md, section 7).
// All of it is constexpr, so that GPU code can call it too.
#pragma once
#include <cstdint>

namespace flash_ext {

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

struct Philox4 {
  uint32_t word[4];
};

constexpr Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * counter.word[0];
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * counter.word[2];
    counter = {{uint32_t(product1 >> 32) ^ counter.word[1] ^ key0, uint32_t(product1),
                uint32_t(product0 >> 32) ^ counter.word[3] ^ key1, uint32_t(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// The random 16 bits of eight neighbouring keys, 8·group to 8·group + 7: key j reads half j & 1
// (low first) of word (j & 7) / 2.
constexpr Philox4 dropout_bits(uint64_t seed, uint64_t offset, uint32_t batch_head, uint32_t query,
                               uint32_t group) {
  return philox4x32_10({{group, query, batch_head, uint32_t(offset)}}, uint32_t(seed),
                       uint32_t(seed >> 32));
}

}  // namespace flash_ext
