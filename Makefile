# make demo    set up, build, run the message-logging echo server and verify its log
# make test    set up, build, run the tests: every room, every promise once; two minutes
# make check   all tests, the slices of the long proofs, lint, types, documentation: what CI runs
# make proof   the long proofs, whole
# Other targets are for developers: see CONTRIBUTING.md.

PYTHON ?= python3
VENV ?= .venv
CC ?= cc
BIN = $(VENV)/bin
BUILD = build
LIMIT = 600
SANITIZE =
# A warning of a compiler that we have not seen is no reason for a user's build to fail; `make check` sets it.
WERROR =
WARNINGS = -Wall -Wextra $(WERROR)
CFLAGS_ALL = -std=gnu11 -D_GNU_SOURCE -O2 -g -fPIC $(WARNINGS) -Icsrc $(SANITIZE)

HEADERS = $(wildcard csrc/*.h)
SOURCES = $(filter-out csrc/hot%.c csrc/spawner_main.c,$(wildcard csrc/*.c))
OBJECTS = $(SOURCES:csrc/%.c=$(BUILD)/csrc/%.o)
CTESTS = $(patsubst tests/c/%.c,$(BUILD)/tests/%,$(wildcard tests/c/test_*.c))
CPEERS = $(patsubst tests/c/peer_%.c,build/peers/%,$(wildcard tests/c/peer_*.c))
CBENCH = $(patsubst bench/c/%.c,build/bench/%,$(wildcard bench/c/*.c))
PIP = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test check strict proof proof-server proofs asan tsan fuzz model mutants bench-server bench-streams bench-objects \
  bench-sync bench-spawner bench-engine check-arm ctest csrc cbench cpeers lint format docs matrix clean

demo: $(VENV)/.built
	@echo "== the demonstration: an echo server, its clients, its log"
	@$(BIN)/ipckit demo

test: $(VENV)/.built-test ctest cpeers cbench
	$(call pytest,not proof and not slow)

# All there is; everything is compiled anew, with warnings as errors.
check: $(VENV)/.dev
	@rm -rf build
	@$(MAKE) --no-print-directory WERROR=-Werror SLICES=1 strict lint docs ctest cpeers cbench proofs
	$(call pytest,proof or not proof)

strict:
	@echo "== the extension modules, warnings as errors"
	@IPCKIT_WERROR=1 $(BIN)/python setup.py -q build_ext --inplace --force
	@touch $(VENV)/.built-test $(VENV)/.built

# $(call pytest,MARKS): first what can run side by side, a process a worker; then, by itself, what measures.
# PYTEST is for choosing tests, and may choose none of the one or of the other kind (status 5), but not of both.
WORKERS = auto
define pytest
	@echo "== tests, side by side: -m '$(1)'"
	@status=0; $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m '($(1)) and not serial' $(PYTEST) || status=$$?; \
	case $$status in 0|5) ;; *) exit $$status ;; esac; \
	echo "== tests that run by themselves"; \
	$(BIN)/python -m pytest -q -m '($(1)) and serial' $(PYTEST) || { alone=$$?; [ $$alone = 5 ] && [ $$status = 0 ] || exit $$alone; }
endef

# --- the environment: one stamp for what a user needs, one for what the tests need, one for what a developer needs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "ipckit needs CPython 3.10 or later; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "== a Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.built: $(VENV)/bin/python pyproject.toml setup.py csrc/build.py $(wildcard csrc/*.[ch])
	@echo "== ipckit and what it needs: fetched, compiled, installed there"
	@$(PIP) -e '.[cli]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "== ipckit, what it needs and what its tests need: fetched, compiled, installed in $(VENV)"
	@$(PIP) -e '.[cli,test]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "== ipckit and all that its developers need: fetched, compiled, installed in $(VENV)"
	@$(PIP) -e '.[cli,test,dev,docs]'
	@touch $@ $(VENV)/.test

$(VENV)/.built-test: $(VENV)/.test setup.py csrc/build.py $(wildcard csrc/*.[ch])
	@echo "== the extension modules"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@ $(VENV)/.built

# --- the C library without Python, its tests, and the C programs of bench/

csrc: $(BUILD)/libipckit.a

$(BUILD)/csrc/%.o: csrc/%.c $(HEADERS)
	@mkdir -p $(@D)
	@echo "compiling $<"
	@$(CC) $(CFLAGS_ALL) -c -o $@ $<

$(BUILD)/libipckit.a: $(OBJECTS)
	@rm -f $@
	@ar rcs $@ $^

$(BUILD)/tests/%: tests/c/%.c tests/c/kernel.h $(BUILD)/libipckit.a
	@mkdir -p $(@D)
	@echo "compiling $<"
	@$(CC) $(CFLAGS_ALL) -UNDEBUG -o $@ $< $(BUILD)/libipckit.a -pthread

# SLICES=1: the slices of the proofs that are in them, too.
# RUN: what runs them, if it is not this machine's processor.
SLICES =
RUN =
ctest: $(CTESTS)
	@echo "== tests in C"
	@for program in $(CTESTS); do \
	  IPCKIT_SLICES=$(SLICES) timeout $(LIMIT) $(RUN) $$program; status=$$?; \
	  case $$status in 0) echo "ok   $$program";; 77) echo "skip $$program";; \
	  *) echo "FAIL $$program (status $$status)"; exit 1;; esac; \
	done

# For another processor, by Debian's cross compiler and an emulator of user programs. The tests find out what the
# emulator lacks of a kernel (robust futexes, for one), and say what they leave out.
check-arm:
	@command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null \
	  || { echo "check-arm needs: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"; exit 1; }
	@$(MAKE) --no-print-directory ctest CC=aarch64-linux-gnu-gcc BUILD=build/aarch64 WERROR=-Werror \
	  RUN='qemu-aarch64 -L /usr/aarch64-linux-gnu'

# What the sanitizers find ends the program. TSan sees races between threads only, not between processes,
# and takes no notice of fences (-Wno-tsan), on which no access rests that isn't atomic itself.
asan:
	$(MAKE) ctest LIMIT=1200 BUILD=build/asan SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=all'

tsan:
	$(MAKE) build/tsan/libipckit.a BUILD=build/tsan SANITIZE='-fsanitize=thread -Wno-tsan'
	@mkdir -p build/tsan/tests
	for room in ring sync connection; do \
	  $(CC) $(CFLAGS_ALL) -UNDEBUG -fsanitize=thread -o build/tsan/tests/test_$$room \
	    tests/c/test_$$room.c tests/proof/tsan_clocklock.c build/tsan/libipckit.a -pthread && \
	  TSAN_OPTIONS=halt_on_error=1 build/tsan/tests/test_$$room threads || exit 1; \
	done

# The proofs in C: stepkill steps through whole functions, so nothing of it is bound late; killloop has
# the kill points; scribble the sanitizers; the fuzz targets need clang, and are skipped without it.
ENGINE = csrc/ring.c csrc/lock.c csrc/wait.c
PROOF_FLAGS = -std=gnu11 -D_GNU_SOURCE -O2 -g $(WARNINGS) -Icsrc
PROOFS = stepkill stepspoil killloop scribble $(if $(shell command -v clang),fuzz_attach fuzz_recv)
build/proof/stepkill build/proof/stepspoil: PROOF_FLAGS += -static
build/proof/killloop: PROOF_FLAGS += -DIK_KILLPOINTS
build/proof/scribble: PROOF_FLAGS += -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
build/proof/fuzz_%: PROOF_FLAGS += -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
build/proof/fuzz_%: PROOF_CC = clang
PROOF_CC = $(CC)

build/proof/%: tests/proof/%.c $(ENGINE) $(HEADERS)
	@mkdir -p $(@D)
	@echo "compiling $<"
	@$(PROOF_CC) $(PROOF_FLAGS) -o $@ $< $(ENGINE) -pthread

proofs: $(PROOFS:%=build/proof/%)

FUZZ_SECONDS = 60
fuzz: proofs
	IPCKIT_PROOF=1 FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -q -s tests/proof/test_engine.py -k fuzz

MODEL = -DSENDERS=2 -DMESSAGES=1
model:
	@mkdir -p build/model
	cd build/model && spin $(MODEL) -a ../../tests/proof/ring.pml
	cd build/model && $(CC) -O2 -w -DSAFETY -DCOLLAPSE -o pan pan.c
	cd build/model && ./pan -m400000 -n | tee pan.txt
	@grep -q 'errors: 0' build/model/pan.txt && ! grep -q 'not completed' build/model/pan.txt

mutants: $(VENV)/.built-test
	$(BIN)/python tests/proof/mutants.py

build/bench/%: bench/c/%.c $(wildcard bench/c/*.h)
	@mkdir -p $(@D)
	@echo "compiling $<"
	@$(CC) -std=gnu11 -D_GNU_SOURCE -O2 $(WARNINGS) -o $@ $< -pthread

# The one that measures our own C.
build/bench/engine: bench/c/engine.c build/libipckit.a
	@mkdir -p $(@D)
	@echo "compiling $<"
	@$(CC) $(CFLAGS_ALL) -o $@ $< build/libipckit.a -pthread

cbench: $(CBENCH)

# Programs that use the kernel without us: what the tests talk to.
build/peers/%: tests/c/peer_%.c
	@mkdir -p $(@D)
	@echo "compiling $<"
	@$(CC) -std=gnu11 -D_GNU_SOURCE -O2 $(WARNINGS) -o $@ $< -pthread

cpeers: $(CPEERS)

# --- developers

lint: $(VENV)/.dev $(VENV)/.built-test
	@echo "== lint and types"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror csrc/*.[ch] tests/c/*.c tests/proof/*.c $(wildcard bench/c/*.[ch])

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.[ch] tests/c/*.c tests/proof/*.c $(wildcard bench/c/*.[ch])

proof: $(VENV)/.built-test ctest cpeers proofs
	IPCKIT_PROOF=1 $(BIN)/python -m pytest -q -s -m proof $(PYTEST)

proof-server: $(VENV)/.built-test
	IPCKIT_PROOF=1 $(BIN)/python -m pytest -q -s tests/proof/test_servers_kill.py $(PYTEST)

bench-streams bench-objects bench-sync bench-spawner: bench-%: $(VENV)/.built-test cbench
	$(BIN)/python bench/bench_$*.py $(BENCH)

# The peers one by one, so that what does not install here is named and left out.
$(VENV)/.bench: $(VENV)/.built-test
	$(BIN)/python bench/install_peers.py
	touch $@

bench-engine bench-server: bench-%: $(VENV)/.bench cbench
	$(BIN)/python bench/bench_$*.py $(BENCH)

matrix:
	@for python in $$(.ci/pythons); do \
	  echo "== $$python"; \
	  $(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 1; \
	done

docs: $(VENV)/.dev
	@echo "== documentation"
	@$(BIN)/python -m sphinx -W -q -b html docs docs/_build/html

clean:
	rm -rf build docs/_build ipckit/_native.c ipckit/*.so ipckit/ipckit-spawner *.egg-info $(VENV)
