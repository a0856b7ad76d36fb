"""llama.cpp's own server, from the package xllamacpp, until it is ended; for an environment that has no strop.

python benchmarks/llama_server.py FILE.gguf --port 8080 --slots 16 --context 1024 --threads 2
"""

from __future__ import annotations

import argparse
import threading

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="requests answered at once")
    parser.add_argument("--context", type=int, required=True, help="tokens of a slot")
    parser.add_argument("--threads", type=int, required=True)
    asked = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = asked.file
    params.port = asked.port
    params.n_parallel = asked.slots
    params.n_ctx = asked.slots * asked.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked.threads
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    print(xllamacpp.get_system_info(), server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
