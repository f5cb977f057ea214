// What test_gpu_sweep.py asks of tools/gpu_sweep.h:
//   shapes ARGUMENTS…   the rounds and the names of the shapes that the sweep's arguments choose, a line each
//   stats NUMBERS…      median, minimum and maximum
//   clocks LINE         the fields of a line of nvidia-smi, as JSON
//   report FILE         writes the JSON of made-up results to FILE, prints the table, and whether all are right
#include "gpu_sweep.h"

#include <iostream>

using namespace sweep;

namespace {

void report(const std::string& file) {
  Block first{"cross_entropy \"8x10\" \\", 320};
  first.clocks_before = parse_clocks("1980, 3201, 120.5, 35, 0x0000000000000000");
  first.results = {{"library", false, "ok", {{"loss", "randn", 1e-7, 2e-7, true}}, {30, 10, 20}},
                   {"ring", false, "wrong", {{"loss", "flat", INFINITY, NAN, false}}},
                   {"other", false, "skipped: not on this card"},
                   {"copy", true, "ok", {}, {9, 8, 8}},
                   {"memcpy", true, "ok", {}, {16, 16, 16}}};
  Block second{"null"};
  second.results = {{"null", false, "ok", {}, {2, 4}}};
  write_json(file, {{"device", "Some\tCard"}}, {first});
  write_json(file, {{"device", "Some\tCard"}}, {first, second});
  std::cout << table({first, second});
  const bool right = all_right({first, second});
  first.results.erase(first.results.begin() + 1);
  std::cout << right << ' ' << all_right({first, second}) << '\n';
}

}  // namespace

int main(int count, char** arguments) try {
  const std::string command = count > 1 ? arguments[1] : "";
  const std::vector<std::string> rest(arguments + 2, arguments + count);
  if (command == "shapes") {
    const Options options = parse(rest);
    std::cout << options.rounds << '\n';
    for (const Shape& s : options.shapes()) std::cout << s.name() << '\n';
  } else if (command == "stats") {
    std::vector<double> values;
    for (const std::string& v : rest) values.push_back(std::stod(v));
    const Stats s = stats_of(values);
    std::cout << s.median << ' ' << s.min << ' ' << s.max << '\n';
  } else if (command == "clocks") {
    std::cout << json(parse_clocks(rest.at(0))) << '\n';
  } else if (command == "report") {
    report(rest.at(0));
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
