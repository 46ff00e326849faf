// Calls methods of an ExecuTorch program as a request says, and writes down what they return.
//
//   runner REQUEST RESPONSE OUTPUTS
//
// REQUEST is UTF-8 text, a record a line, its fields separated by one tab:
//
//   program  PATH                        the .pte, mapped into memory; exactly once
//   data     PATH                        a .ptd with the program's external tensors; any number
//   call     METHOD                      then one line for each of its inputs, in order:
//   input    DTYPE  SHAPE  OFFSET  PATH  contiguous little-endian numbers of a file, from a byte on
//   result   CALL  INDEX                 an output of an earlier call, both counted from 0
//
// SHAPE is sizes with an x between them, as 1x32x64, or - for a single number. Calls run in order
// in one process, so what a method keeps between calls (a KV cache) is kept. Files are mapped
// privately: a program that writes to an input does not change the file.
//
// OUTPUTS receives the numbers of all outputs, each from a multiple of 64 bytes on. RESPONSE says
// what they are, and ends with "done" where every call succeeded:
//
//   call     METHOD
//   output   DTYPE  SHAPE  OFFSET
//   done
//
// Exit codes: 0; 2 the request is wrong; 3 the program does not load; 4 a call fails; 5 ExecuTorch
// aborts. The reason is one line on standard error.

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "program.h"
#include "request.h"

namespace {

class Runner {
 public:
  Runner(const std::string& response, const std::string& outputs)
      : response_(response), outputs_(outputs, std::ios::binary) {
    if (!response_ || !outputs_) {
      throw Failure{kRequest, "cannot write to " + response + " and " + outputs + "."};
    }
  }

  // One record of the request.
  void take(const std::vector<std::string>& fields) {
    const std::string& kind = fields[0];
    const size_t count = fields.size() - 1;
    if (kind == "program" && count == 1) {
      path_ = fields[1];
    } else if (kind == "data" && count == 1) {
      data_.push_back(fields[1]);
    } else if (kind == "call" && count == 1) {
      finish_call();
      method_ = fields[1];
    } else if (kind == "input" && count == 4 && !method_.empty()) {
      add_input(fields[1], parse_shape(fields[2]), number(fields[3]), fields[4]);
    } else if (kind == "result" && count == 2 && !method_.empty()) {
      add_result(number(fields[1]), number(fields[2]));
    } else {
      throw Failure{kRequest, "the request has a record '" + kind + "' with " +
                                  std::to_string(count) + " fields, which it cannot have there."};
    }
  }

  void finish() {
    finish_call();
    response_ << "done\n";
    if (!response_.flush() || !outputs_.flush()) {
      throw Failure{kRequest, "the outputs cannot be written: is the disk full?"};
    }
  }

 private:
  void add_input(const std::string& dtype, Shape shape, size_t offset, const std::string& path) {
    const auto type = kDtypes.find(dtype);
    if (type == kDtypes.end()) {
      throw Failure{kRequest, "the request has an unknown dtype '" + dtype + "'."};
    }
    if (files_.count(path) == 0) files_[path] = map_file(path);
    const Mapping& file = files_[path];
    size_t size = executorch::runtime::elementSize(type->second);
    bool fits = offset <= file.size;
    for (const size_t n : shape) fits = !__builtin_mul_overflow(size, n, &size) && fits;
    if (!fits || size > file.size - offset) {
      throw Failure{kRequest, "an input of " + method_ + ", " + dtype + " " + shape_name(shape) +
                                  " from byte " + std::to_string(offset) + " on, is not within " +
                                  path + ", which has " + std::to_string(file.size) + " bytes."};
    }
    inputs_.push_back(from_blob(file.bytes + offset, std::move(shape), type->second));
  }

  void add_result(size_t call, size_t index) {
    if (call >= results_.size() || index >= results_[call].size()) {
      throw Failure{kRequest, "an input of " + method_ + " is output " + std::to_string(index) +
                                  " of call " + std::to_string(call) + ", which there is not."};
    }
    Output& output = results_[call][index];
    inputs_.push_back(from_blob(output.bytes.data(), output.shape, output.dtype));
  }

  void finish_call() {
    if (method_.empty()) return;
    if (path_.empty()) throw Failure{kRequest, "the request names no program."};
    if (!program_) program_ = std::make_unique<Program>(path_, data_);
    results_.push_back(program_->call(method_, inputs_));
    response_ << "call\t" << method_ << "\n";
    for (const Output& output : results_.back()) write(output);
    inputs_.clear();
    method_.clear();
  }

  void write(const Output& output) {
    response_ << "output\t" << dtype_name(output.dtype) << "\t" << shape_name(output.shape) << "\t"
              << written_ << "\n";
    const size_t padding = (kAlignment - output.bytes.size() % kAlignment) % kAlignment;
    outputs_.write(reinterpret_cast<const char*>(output.bytes.data()), output.bytes.size());
    outputs_ << std::string(padding, '\0');
    written_ += output.bytes.size() + padding;
  }

  std::ofstream response_, outputs_;
  size_t written_ = 0;
  std::string path_, method_;
  std::vector<std::string> data_;
  std::map<std::string, Mapping> files_;
  std::unique_ptr<Program> program_;
  std::vector<TensorPtr> inputs_;
  std::vector<std::vector<Output>> results_;
};

void run(const std::string& path, Runner& runner) {
  std::ifstream request(path);
  if (!request) throw Failure{kRequest, "cannot read the request " + path + "."};
  for (std::string line; std::getline(request, line);) {
    std::vector<std::string> fields;
    std::istringstream stream(line);
    for (std::string field; std::getline(stream, field, '\t');) fields.push_back(field);
    if (!fields.empty()) runner.take(fields);
  }
  runner.finish();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: runner REQUEST RESPONSE OUTPUTS\n");
    return kRequest;
  }
  listen();
  try {
    Runner runner(arguments[2], arguments[3]);
    run(arguments[1], runner);
  } catch (const Failure& failure) {
    std::fprintf(stderr, "%s\n", failure.reason.c_str());
    _exit(failure.code);
  }
  _exit(0);  // the work is done, and a library's destructor could still crash
}
