"""Say what this machine lacks before anything is installed. Standard library only, old Pythons included.

python3 tools/preflight.py             what a virtual environment needs: an error if missing
python3 tools/preflight.py compiler    what a compiled step needs too
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile

OLDEST = (3, 11)

PYTHON = """\
Memberwise needs Python {oldest} or newer; {executable} is {found}.
Name another one: make PYTHON=python3.12 ..."""

VENV = """\
{executable} cannot make a virtual environment: its module {module!r} is missing.
  Debian, Ubuntu:  apt install python{version}-venv
  Fedora:          dnf install python3-libs python3-pip
  others:          any Python from python.org, pyenv, conda or uv brings it"""

COMPILER = """\
A compiled training step needs a C++ compiler with OpenMP, and Python's headers; {why}.
  Debian, Ubuntu:  apt install g++ python{version}-dev
  Fedora:          dnf install gcc-c++ python3-devel
  macOS:           xcode-select --install; brew install libomp
Without them everything still runs, but no step is compiled (warning MW502)."""

PROGRAM = "#include <Python.h>\n{omp}int main() {{ return 0; }}\n"
OPENMP = sys.platform != "darwin"  # there, torch brings its own and adds the flags


def missing_for_venv():
    """Why no virtual environment can be made; "" if one can."""
    words = {"executable": sys.executable, "version": "%d.%d" % sys.version_info[:2]}
    if sys.version_info[:2] < OLDEST:
        return PYTHON.format(oldest="%d.%d" % OLDEST, found=words["version"], **words)
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            return VENV.format(module=module, **words)
    return ""


def missing_for_compiler():
    """Why nothing can be compiled; "" if a small program can."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), "")
    found = compiler and shutil.which(compiler)
    why = _failure(compiler) if found else "no compiler was found (g++, clang++)"
    return why and COMPILER.format(why=why, version="%d.%d" % sys.version_info[:2])


def _failure(compiler):
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "program.cpp")
        with open(source, "w") as file:
            file.write(PROGRAM.format(omp="#include <omp.h>\n" if OPENMP else ""))
        command = [compiler, source, "-fsyntax-only", "-I" + sysconfig.get_paths()["include"]]
        command += ["-fopenmp"] if OPENMP else []
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    errors = [line for line in done.stdout.splitlines() if "error" in line] or [compiler + " failed"]
    return "" if done.returncode == 0 else errors[0].replace(folder + os.sep, "")


def main(arguments):
    """Print what is missing; the exit status is 1 if anything is."""
    missing = [missing_for_venv()]
    if "compiler" in arguments and not missing[0]:
        missing.append(missing_for_compiler())
    print("\n".join(filter(None, missing)), end="\n" if any(missing) else "", file=sys.stderr)
    return 1 if any(missing) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
