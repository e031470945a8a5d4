#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tacext {

/// The header of a safetensors file.
struct SafetensorsHeader {
  struct Entry {
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::uint64_t begin = 0, end = 0;  ///< bytes, counted from the end of the header
  };
  std::map<std::string, std::string> metadata;
  std::map<std::string, Entry> tensors;
};

/// Where the tensors begin, in bytes; 0 where these bytes are no safetensors file, and *why says
/// what is wrong. That entries lie within the file is for the caller to check.
std::size_t read_safetensors_header(const char* bytes, std::size_t size, SafetensorsHeader* header,
                                    std::string* why);

}  // namespace tacext
