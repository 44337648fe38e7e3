// Which instruction set the CPU backend uses. Chosen once, at the first call: the best that the machine
// has, or what the environment variable FLASH_EXT_CPU_ISA names.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace flash_ext::cpu {

std::vector<std::string> usable_isas();  // best first
std::string current_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument
const Kernels& kernels_for(DType dtype);

}  // namespace flash_ext::cpu
