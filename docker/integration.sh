#!/usr/bin/env bash
# Runs the integration tests in containers: builds both images, starts the drive, waits until it is
# healthy, runs the tests in the host's container and ends with their exit status. Takes everything
# down again, whatever happened. Without a Docker engine it says that it skips, and why.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
  echo "integration tests in containers: skipped: $1"
  exit 0
}

command -v docker >/dev/null || skip "there is no docker command here"
why=$(docker info 2>&1 >/dev/null) ||
  skip "no Docker engine answers (DOCKER_HOST=${DOCKER_HOST:-unset}): ${why%%$'\n'*}"
if docker compose version >/dev/null 2>&1; then
  compose=(docker compose)
elif command -v docker-compose >/dev/null; then
  compose=(docker-compose)
else
  skip "neither 'docker compose' nor 'docker-compose' is here"
fi
compose+=(--project-name "csd-integration-$$")

down() { "${compose[@]}" down --volumes --remove-orphans --timeout 20 >/dev/null 2>&1 || true; }
trap down EXIT
trap 'exit 130' INT TERM

"${compose[@]}" build
status=0
"${compose[@]}" up --no-build --exit-code-from host || status=$?
if [ "$status" -ne 0 ]; then
  echo "integration tests in containers: failed with status $status; what the drive said:"
  "${compose[@]}" logs --no-color --tail 50 device || true
  exit "$status"
fi
echo "integration tests in containers: passed"
