"""Stands in for scripts/launch_vllm_server.sh: fake_vllm.py MANNER SIZE --port P ...

A MANNER is one of: up (answers /health, with a child process as vLLM has), dies (exits 3 with a message), fails (as
vLLM does whose engine did not start: the reason comes long before the end), stubborn (as up, but ignores SIGTERM),
silent (never answers).
"""

from __future__ import annotations

import http.server
import signal
import subprocess
import sys
import time

manner, arguments = sys.argv[1], sys.argv[2:]
port = int(arguments[arguments.index("--port") + 1])
print("launch_vllm_server: float32, because a test says so (--dtype chooses another type)", flush=True)
print("(APIServer pid=7) INFO 11-21 13:17:27 [core.py:1] \x1b[1mloading weights\x1b[0m", flush=True)
print("(Worker pid=9) INFO 11-21 13:17:28 [cpu_model_runner.py:68] Starting to load model /models/m...", flush=True)
if manner == "dies":
    print("ValueError: No module named vllm", flush=True)
    sys.exit(3)
if manner == "fails":
    print(
        "(APIServer pid=7) WARNING 11-21 13:17:28 [system_utils.py:1] errors like `OSError: too many files`", flush=True
    )
    print(
        "(EngineCore pid=8) ERROR 11-21 13:17:29 [core.py:2] RuntimeError: Insufficient space in /dev/shm", flush=True
    )
    print("(APIServer pid=7) asyncio.exceptions.CancelledError: the engine is gone", flush=True)
    for number in range(30):
        print(f"(APIServer pid=7)   File line {number}", flush=True)
    print("(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(1)
ignore = "signal.signal(15, signal.SIG_IGN); " if manner == "stubborn" else ""
if manner == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", f"import signal, time; {ignore}time.sleep(600)"])
print(f"child {child.pid}", flush=True)
if manner == "silent":
    time.sleep(600)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
