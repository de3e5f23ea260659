"""A real Triton Inference Server on this machine, from the nvidia-pytriton wheel, for tests and local trials.

    with EmbeddedServer(export_dir / "model_repository", "posttrain", env, log_file) as server:
        client = TritonClient(server.http_url, server.grpc_url, "posttrain")

Loopback only, CPU only, without the security fixes of later releases: not for production. The server lives in
an environment of its own (numpy 1, tritonserver); `serving/supervisor.py` owns the process and cleans up
after it however this one ends. What each argument and variable is for is said where it is set.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from posttrain.errors import PosttrainError, UserError
from serving.ports import free_ports, reserve

ENV_VARIABLE = "POSTTRAIN_TRITON_ENV"
GRACE_SECONDS = 8.0
POLL_SECONDS = 0.1
_HERE = Path(__file__).resolve().parent


def find_environment(configured: str) -> Path:
    """The environment that holds tritonserver: POSTTRAIN_TRITON_ENV, or `configured`.

    Raises UserError, with the command that makes it, when it is not there or holds no tritonserver.
    """
    environment = Path(os.environ.get(ENV_VARIABLE) or configured).expanduser().absolute()
    if not (environment / "bin" / "python3").exists():
        what = "does not exist"
    elif not _packages(environment).joinpath("pytriton/tritonserver/bin/tritonserver").is_file():
        what = "holds no tritonserver"
    else:
        return environment
    raise UserError(
        f"{environment}: the Triton environment {what}\n"
        f"    make it with `make triton-env`, or `scripts/setup_triton_env.sh {environment}`, "
        f"or name another one in {ENV_VARIABLE}"
    )


def _packages(environment: Path) -> Path:
    for candidate in sorted((environment / "lib").glob("python3.*/site-packages")):
        return candidate
    return environment / "lib"


@dataclass(frozen=True)
class Recovery:
    """When a server that was ready once is restarted, and how often; see serving/supervisor.py.

    probe_timeout_s: seconds without an answer after which a model counts as hung. More than `max_restarts` in
    `restart_window_s` seconds end the server.
    """

    probe_timeout_s: float = 10.0
    max_restarts: int = 5
    restart_window_s: float = 300.0


class EmbeddedServer:
    """A context manager: inside, one model of a repository is being served; after it, nothing is left.

    http_url, grpc_url, metrics_url: "127.0.0.1:port", the same after a restart.
    """

    def __init__(
        self,
        repository: Path,
        model_name: str,
        environment: Path,
        log_file: Path,
        *,
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        start_timeout_s: float = 300.0,
        recovery: Recovery = Recovery(),
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Ports without a number are chosen free; `on_wait` gets the seconds waited, many times a second."""
        self.repository = repository.absolute()
        self.model_name = model_name
        self.environment = environment
        self.log_file = log_file.absolute()
        self.start_timeout_s = start_timeout_s
        self.recovery = recovery
        self.on_wait = on_wait
        ports = free_ports(3)
        self.http_url = f"127.0.0.1:{http_port or ports[0]}"
        self.grpc_url = f"127.0.0.1:{grpc_port or ports[1]}"
        self.metrics_url = f"127.0.0.1:{metrics_port or ports[2]}"
        self.shm_prefix = f"posttrain-{os.getpid()}-{uuid.uuid4().hex[:8]}-"
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._ports = ExitStack()

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the model answers.

        Raises UserError when a port is taken (another server there could pass for this one), and
        PosttrainError with the end of the log when the model never answers.
        """
        with ExitStack() as ports:
            for url in (self.http_url, self.grpc_url, self.metrics_url):
                ports.enter_context(reserve(url))
            self._ports = ports.pop_all()
        work_dir = self._prepare()
        self.log_file.write_bytes(b"")
        settings = {
            "work_dir": str(work_dir),
            "shm_prefix": self.shm_prefix,
            "log_file": str(self.log_file),
            "url": self.http_url,
            "model": self.model_name,
            "grace_s": GRACE_SECONDS,
            "start_timeout_s": self.start_timeout_s,
            **asdict(self.recovery),
        }
        command = [sys.executable, "-I", str(_HERE / "supervisor.py"), json.dumps(settings), "--"]
        self._supervisor = subprocess.Popen(
            command + self._arguments(work_dir),
            stdin=subprocess.PIPE,
            env=self._variables(work_dir),
            start_new_session=True,
        )
        try:
            self.wait_until_ready()
            # Its first look at the model may come after the server's first failure.
            os.write(self._supervisor.stdin.fileno(), b"ready")  # type: ignore[union-attr]
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and wait until its processes, shared memory and work directory are gone."""
        if self._supervisor is None:
            return
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()
        try:
            self._supervisor.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            # A forked child of this process may still hold the pipe open.
            self._supervisor.terminate()
            self._supervisor.wait()
        self._supervisor = None
        self._ports.close()

    def running(self) -> bool:
        """Whether the server is there, or on its way back. False for good once the supervisor gave it up."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def ready(self) -> bool:
        """Whether the model answers its readiness check."""
        return http_ok(f"http://{self.http_url}/v2/models/{self.model_name}/ready")

    def wait_until_ready(self) -> None:
        """Wait until the model answers: at the start, and after a failure for its coming back.

        Raises PosttrainError with the end of the log when it never does.
        """
        started = time.monotonic()
        while not self.ready():
            waited = time.monotonic() - started
            if not self.running():
                raise PosttrainError(f"tritonserver ended before it was ready\n{self.log_tail()}")
            if waited > self.start_timeout_s:
                raise PosttrainError(
                    f"tritonserver was not ready after {self.start_timeout_s:.0f} s (start_timeout_s)\n"
                    f"{self.log_tail()}"
                )
            self.on_wait(waited)
            time.sleep(POLL_SECONDS)

    def _prepare(self) -> Path:
        """A backend directory of our own and an empty working directory (which is on the stub's sys.path)."""
        packages = _packages(self.environment)
        triton = packages / "pytriton" / "tritonserver"
        version = packages.parent.name.removeprefix("python")
        work_dir = Path(tempfile.mkdtemp(prefix="posttrain-triton-"))
        python = work_dir / "backends" / "python"
        python.mkdir(parents=True)
        for name in ("cwd", "tmp"):
            (work_dir / name).mkdir()
        # A linked library is refused ("escapes backend directory"); a copied stub finds no libcudart.
        shutil.copy2(triton / "backends/python/libtriton_python.so", python)
        for target in (
            triton / "backends/python/triton_python_backend_utils.py",
            triton / "python_backend_stubs" / version / "triton_python_backend_stub",
        ):
            (python / target.name).symlink_to(target)
        vllm = work_dir / "backends" / "vllm"
        vllm.mkdir()
        shutil.copy2(_HERE / "backends" / "vllm" / "model.py", vllm)
        # The backend's folder is on the stub's sys.path, so model.py imports the rest under its usual name.
        (vllm / "serving").symlink_to(_HERE)
        return work_dir

    def _arguments(self, work_dir: Path) -> list[str]:
        binary = _packages(self.environment) / "pytriton/tritonserver/bin/tritonserver"
        return [
            str(binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={work_dir / 'backends'}",
            f"--cache-directory={_packages(self.environment) / 'pytriton/tritonserver/caches'}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            "--model-control-mode=explicit",
            f"--load-model={self.model_name}",
            "--http-address=127.0.0.1",
            f"--http-port={self.http_url.rpartition(':')[2]}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc_url.rpartition(':')[2]}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self.metrics_url.rpartition(':')[2]}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--exit-timeout-secs=5",
            # Auto-complete would start a second stub, which imports torch once more.
            "--disable-auto-complete-config",
        ]

    def _variables(self, work_dir: Path) -> dict[str, str]:
        libraries = subprocess.run(
            [
                self.environment / "bin/python3",
                "-c",
                "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))",
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PYTHON") and name not in ("VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
        }
        return kept | {
            # The stub takes its prefix from the first python3 on PATH, and needs that one's libpython.
            "PATH": os.pathsep.join([str(self.environment / "bin"), os.environ.get("PATH", os.defpath)]),
            "LD_LIBRARY_PATH": libraries,
            # What torch and its like leave there goes with the rest.
            "TMPDIR": str(work_dir / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def log_tail(self, lines: int = 15) -> str:
        """Where the log is, and its last lines."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        telling = [
            line
            for line in text.splitlines()
            if line.startswith(("E", "supervisor:", "terminate called")) or "Error" in line
        ]
        shown = (telling or text.splitlines())[-lines:]
        return "\n".join([f"    log: {self.log_file}", *(f"    | {line[:300]}" for line in shown)])


def http_ok(url: str) -> bool:
    """Whether a GET is answered with 200, without any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
