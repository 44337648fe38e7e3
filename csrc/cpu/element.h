// The 16-bit storage types and their scalar conversions (round to nearest even).
#pragma once
#include <bit>
#include <cstdint>

namespace flash_ext::cpu {

struct bf16_t {
  uint16_t bits;
};
struct half_t {
  uint16_t bits;
};

inline float to_float(bf16_t x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(half_t x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00)  // inf, NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400)  // zero, subnormal: an exact product
    return std::bit_cast<float>(std::bit_cast<uint32_t>(float(magnitude) * 0x1p-24f) | sign);
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
}

template <typename T>
T from_float(float x);

template <>
inline bf16_t from_float<bf16_t>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline half_t from_float<half_t>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or is more
  if (magnitude < 0x38800000) {  // below the smallest normal: let the adder round at 2^-24
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (std::bit_cast<uint32_t>(rounded) - std::bit_cast<uint32_t>(0.5f)))};
  }
  return {uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

}  // namespace flash_ext::cpu
