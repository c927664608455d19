# hwopt_add_model(name MODEL file [options]): a static library target `name`, with its header <name>.h, made from a trained model.
#
#   MODEL file            an ONNX file
#   TARGET name|file      the hardware; by CMAKE_SYSTEM_PROCESSOR if not given, never the machine that builds
#   PLAN file             replay this plan instead of deciding
#   TUNING_DB file        schedules that `hwopt tune` found
#   CALIBRATE file        inputs to calibrate with (.npz)
#   EVALUATE file         inputs and labels to judge with (.npz)
#   MAX_DROP 1%           how much the score may fall
#   BUDGET limit...       latency=2ms, size=1MB, memory=4MB
#   SHAPE name=1,3,32,32  freeze an input's sizes (several)
#   PASSES text           families to consider, or passes to apply
#   THREADS n             threads of a run
#   FLAGS flag...         anything else for `hwopt compile`
#
# Nothing is measured or tuned in a build: the same inputs give the same bytes. HWOPT_COMMAND (a list) may name another hwopt.
cmake_minimum_required(VERSION 3.20)
include_guard(GLOBAL)

if(NOT DEFINED HWOPT_COMMAND)
  # A tool of the machine that builds, also when compiling for another one.
  find_program(HWOPT_PYTHON NAMES python3 python DOC "Python with hwopt" NO_CMAKE_FIND_ROOT_PATH)
  if(NOT HWOPT_PYTHON)
    message(FATAL_ERROR "hwopt: no Python found; set HWOPT_PYTHON to the one that hwopt is installed for")
  endif()
  set(HWOPT_COMMAND "${HWOPT_PYTHON};-m;hwopt" CACHE STRING "How to run hwopt")
endif()

# The portable target of a processor, in CMake's words.
function(_hwopt_default_target out)
  string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
  if(processor MATCHES "^(x86_64|amd64)$")
    set(found x86-64-v3)
  elseif(processor MATCHES "^(aarch64|arm64)$")
    set(found cortex-a72)
  elseif(processor MATCHES "^arm")
    set(found cortex-a7)
  elseif(processor MATCHES "^riscv64$")
    set(found riscv64)
  else()
    message(FATAL_ERROR "hwopt_add_model: no default target for ${CMAKE_SYSTEM_PROCESSOR}; state TARGET (see: hwopt targets)")
  endif()
  set(${out} ${found} PARENT_SCOPE)
endfunction()

function(hwopt_add_model name)
  set(single MODEL TARGET PLAN TUNING_DB CALIBRATE EVALUATE MAX_DROP PASSES THREADS)
  cmake_parse_arguments(PARSE_ARGV 1 A "" "${single}" "SHAPE;BUDGET;FLAGS")
  if(A_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "hwopt_add_model(${name}): unknown argument ${A_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT A_MODEL)
    message(FATAL_ERROR "hwopt_add_model(${name}): MODEL is missing")
  endif()
  if(NOT A_TARGET)
    _hwopt_default_target(A_TARGET)
  endif()

  get_filename_component(model "${A_MODEL}" ABSOLUTE)
  set(inputs "${model}")
  set(options)
  foreach(key IN ITEMS PLAN TUNING_DB CALIBRATE EVALUATE)
    if(A_${key})
      string(TOLOWER "${key}" option)
      string(REPLACE "_" "-" option "${option}")
      get_filename_component(file "${A_${key}}" ABSOLUTE)
      list(APPEND options "--${option}" "${file}")
      list(APPEND inputs "${file}")
    endif()
  endforeach()
  if(A_TARGET MATCHES "\\.toml$")
    get_filename_component(A_TARGET "${A_TARGET}" ABSOLUTE)
    list(APPEND inputs "${A_TARGET}")
  endif()
  foreach(key IN ITEMS MAX_DROP PASSES THREADS)
    if(DEFINED A_${key})
      string(TOLOWER "${key}" option)
      string(REPLACE "_" "-" option "${option}")
      list(APPEND options "--${option}" "${A_${key}}")
    endif()
  endforeach()
  foreach(shape IN LISTS A_SHAPE)
    list(APPEND options --shape "${shape}")
  endforeach()
  foreach(limit IN LISTS A_BUDGET)
    list(APPEND options --budget "${limit}")
  endforeach()

  set(folder "${CMAKE_CURRENT_BINARY_DIR}/${name}.hwopt")
  set(library "${folder}/lib${name}.a")
  # Makefiles only ever add to what earlier depfiles listed: a file that is gone, say after an upgrade of hwopt, would be missed
  # by every build from then on. Without CMake's notes of the last time they begin anew.
  set(forget)
  if(CMAKE_GENERATOR MATCHES "Makefiles")
    set(notes "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/${name}_hwopt.dir/compiler_depend.internal")
    set(forget COMMAND "${CMAKE_COMMAND}" -E rm -f "${notes}")
  endif()
  add_custom_command(
    OUTPUT "${library}" "${folder}/${name}.h"
    COMMAND "${CMAKE_COMMAND}" -E env "CC=${CMAKE_C_COMPILER}" ${HWOPT_COMMAND} compile "${model}" --name "${name}"
            --target "${A_TARGET}" -o "${folder}" --emit static --no-measure --depfile "${folder}.d" ${options} ${A_FLAGS}
    ${forget}
    DEPENDS ${inputs}
    DEPFILE "${folder}.d"
    COMMENT "hwopt: ${A_MODEL} -> ${name} for ${A_TARGET}"
    VERBATIM)
  add_custom_target(${name}_hwopt DEPENDS "${library}" "${folder}/${name}.h")
  file(MAKE_DIRECTORY "${folder}")
  find_package(Threads REQUIRED)
  add_library(${name} STATIC IMPORTED GLOBAL)
  add_dependencies(${name} ${name}_hwopt)
  set_target_properties(${name} PROPERTIES
    IMPORTED_LOCATION "${library}"
    INTERFACE_INCLUDE_DIRECTORIES "${folder}"
    INTERFACE_LINK_LIBRARIES "Threads::Threads;m")
endfunction()
