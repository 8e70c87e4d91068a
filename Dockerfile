# The pinned packages of requirements.lock and the quickstart, in a container.
#   docker build -t net2net . && docker run --rm -v "$PWD/runs:/net2net/runs" net2net
FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /net2net
# The packages come first, so that a change of the code does not install them again.
COPY Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY net2net net2net
RUN make setup
COPY . .
CMD ["make", "demo"]
