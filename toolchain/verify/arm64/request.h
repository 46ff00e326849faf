// What a request is made of: failures, numbers, dtypes, shapes, files. The format is in runner.cpp.

#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>

using executorch::aten::ScalarType;

constexpr size_t kAlignment = 64;  // bytes; no kernel asks for more

enum Exit { kRequest = 2, kLoad = 3, kCall = 4, kAbort = 5 };

struct Failure {
  Exit code;
  std::string reason;
};

using Shape = std::vector<executorch::aten::SizesType>;

const std::map<std::string, ScalarType> kDtypes = {
    {"float32", ScalarType::Float}, {"float64", ScalarType::Double},
    {"float16", ScalarType::Half},  {"bfloat16", ScalarType::BFloat16},
    {"int64", ScalarType::Long},    {"int32", ScalarType::Int},
    {"int16", ScalarType::Short},   {"int8", ScalarType::Char},
    {"uint8", ScalarType::Byte},    {"bool", ScalarType::Bool},
};

inline std::string dtype_name(ScalarType dtype) {
  for (const auto& [name, type] : kDtypes) {
    if (type == dtype) return name;
  }
  return executorch::runtime::toString(dtype);
}

template <typename Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string name;
  for (const auto size : sizes) name += (name.empty() ? "" : "x") + std::to_string(size);
  return name.empty() ? "-" : name;
}

inline int64_t number(const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != 0 || errno != 0 || value < 0) {
    throw Failure{kRequest, "the request has '" + text + "' where a number is expected."};
  }
  return value;
}

inline Shape parse_shape(const std::string& text) {
  Shape shape;
  std::istringstream stream(text == "-" ? "" : text);
  for (std::string size; std::getline(stream, size, 'x');) {
    shape.push_back(static_cast<Shape::value_type>(number(size)));
    if (shape.back() != number(size)) {
      throw Failure{kRequest, "the request has the shape " + text + ", which no tensor can have."};
    }
  }
  return shape;
}

// A whole file in memory; changes stay in this process.
struct Mapping {
  uint8_t* bytes = nullptr;
  size_t size = 0;
};

inline Mapping map_file(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) {
    throw Failure{kRequest, "cannot read " + path + ": " + std::strerror(errno) + "."};
  }
  Mapping mapping;
  mapping.size = status.st_size;
  void* bytes = nullptr;
  if (mapping.size > 0) {
    bytes = mmap(nullptr, mapping.size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  }
  if (bytes == MAP_FAILED) {
    throw Failure{kRequest, "cannot map " + path + ": " + std::strerror(errno) + "."};
  }
  close(file);
  mapping.bytes = static_cast<uint8_t*>(bytes);
  return mapping;
}
