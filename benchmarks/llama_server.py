"""Run llama.cpp's server from the package xllamacpp. Does not need strop.

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
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.file
    params.port = args.port
    params.n_parallel = args.slots
    params.n_ctx = args.slots * args.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    print(xllamacpp.get_system_info(), server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
