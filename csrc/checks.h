// The one way to refuse an argument: an exception whose message names it, what was expected and what came.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace flash_ext {

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace flash_ext

#define FX_CHECK(condition, ...)                                   \
  do {                                                             \
    if (!(condition)) [[unlikely]]                                 \
      throw std::runtime_error(::flash_ext::message(__VA_ARGS__)); \
  } while (false)
