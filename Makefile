# Everything a person or CI does with Boomerang. `make help` lists it.
#
# Builds go to one folder outside the clone, shared by all clones, because RocksDB takes about fourteen minutes to
# compile, once per profile: set CARGO_TARGET_DIR to have it elsewhere. `run`, `test`, `verify` and `fix` share one
# profile (dev: optimised, with assertions), so they need one compile; only `bench`, `overload` and `release` build another.

export CARGO_TARGET_DIR ?= $(HOME)/.cache/boomerang/target
BIN := $(CARGO_TARGET_DIR)/debug
BENCH_BIN := $(CARGO_TARGET_DIR)/release

.DEFAULT_GOAL := help
.PHONY: help setup build run cluster cluster-down test test-random verify fix bench overload release fuzz clean-data \
        jepsen jepsen-smoke jepsen-hour sim fresh coverage

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## Install what the system lacks: compiler, libclang, protoc, etcd, iproute2
	@scripts/setup.sh

build: setup
	@[ -d $(BIN)/deps ] || echo "First build: RocksDB compiles for about 14 minutes on two cores, once."
	cargo build --bins

run: build ## Build, and run one node on loopback for trying things out
	@echo
	@echo "Try it from another terminal:"
	@echo "  $(BIN)/boomtool listen --tcp 127.0.0.1:9000 --count 1 &"
	@echo "  $(BIN)/boomtool task register 'hello, future me' --in 3s --callback tcp://127.0.0.1:9000"
	@echo
	@$(BIN)/boomerang dev $(ARGS)

cluster: build ## Start etcd and three nodes on this machine, logs in .boomerang-cluster/logs
	@BIN=$(BIN) $(BIN)/cluster up

cluster-down: ## Stop them
	@if [ -d "$${FOLDER:-.boomerang-cluster}" ]; then \
		[ -x $(BIN)/cluster ] || { echo "$(BIN)/cluster is not there: 'make build' makes it" >&2; exit 1; }; \
		$(BIN)/cluster down; fi

test: setup ## Run every test, and the fault tests for a minute
	@[ -d $(BIN)/deps ] || echo "First build: RocksDB compiles for about 14 minutes on two cores, once."
	cargo test
	$(MAKE) jepsen-smoke

test-random: setup ## Run the tests that act at random with fresh seeds, ten times over (ROUNDS=10)
	@scripts/test-random.sh

jepsen: build ## Five nodes under mixed faults for three minutes, and what their clients and receivers saw
	$(BIN)/jepsen run --time 3m $(ARGS)

# On time after healing is 500 ms by default, fifty times what an idle machine needs. Where tests run other work does, too:
# beside a compiler up to 500 ms were seen, so 2 s here.
jepsen-smoke: build ## The same with killed, paused and cut off nodes, for about a minute
	$(BIN)/jepsen run --time 20s --after 20s --late 2s --faults kill,pause,partition --out $(CARGO_TARGET_DIR)/jepsen-smoke $(ARGS)

jepsen-hour: build release ## Mixed faults for an hour, on what is shipped
	$(BIN)/jepsen run --time 1h --binaries $(BENCH_BIN) $(ARGS)

sim: build ## Ten thousand simulated schedules, in about half an hour
	$(BIN)/jepsen sim --schedules 10000 $(ARGS)

verify: setup ## Check everything and change nothing: format, lints, documentation, tests (what CI does)
	cargo fmt --all --check
	cargo clippy --all-targets -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --no-deps --document-private-items
	$(MAKE) test

fresh: ## Set up in a bare root, as root; with FULL=1 also run, and run every test
	@scripts/fresh.sh

coverage: setup ## Count the lines that the default tests cover, by room; takes a build of its own
	@scripts/coverage.sh $(ARGS)

fix: ## Format, and apply what clippy can mend by itself
	cargo clippy --all-targets --fix --allow-dirty --allow-staged
	cargo fmt --all

release: setup ## Build what is shipped (not jepsen, whose simulation wants another tokio)
	cargo build --release -p boomerang -p boomtool --bins

bench: release ## Measure: scripts/bench.sh, release build, results as JSON lines
	@BIN=$(BENCH_BIN) scripts/bench.sh

overload: release ## Three nodes, offered twice what they carry for ten minutes: exit code 1 if a promise is broken
	@$(BENCH_BIN)/boomtool bench overload $(ARGS)

fuzz: ## Fuzz the frame decoder until stopped (needs nightly Rust and cargo-fuzz)
	cd fuzz && cargo +nightly fuzz run frames

clean-data: cluster-down ## Delete the data of `make run` and `make cluster`
	rm -rf .boomerang-dev .boomerang-cluster
