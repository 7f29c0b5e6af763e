"""The Pods of a Kubernetes API over HTTP, where a Pod is a host of a NetLab.

Create boots a host with an address, a home and a /tmp of its own, and runs the first container's command there (the
image is ignored); delete switches it off, and those it owns; exec runs in it over the WebSocket protocol. The official
Python client and kubectl talk to it as they are. There is no scheduler but a number of places, no watch, no admission,
no RBAC and no TLS: it shows that a client's calls work together, not that a cluster would admit them.
"""

import base64
import ctypes
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import threading
import time
import uuid
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.cluster.netlab import NetLab

PORT = 8001
CLONE_NEWNET = 0x40000000
CHANNELS = {"in": 0, "out": 1, "err": 2, "status": 3}
PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
VERSION = {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
POD = {"singularName": "pod", "namespaced": True, "kind": "Pod", "shortNames": ["po"]}
DISCOVERY = {
    "/version": VERSION,
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [
            {"name": "pods", **POD, "verbs": ["create", "delete", "get", "list", "patch"]},
            {"name": "pods/exec", **POD, "verbs": ["create", "get"]},
        ],
    },
}


class KubeLab(NetLab):
    """A cluster with some places for Pods; within `with` its API answers on the host `control` and on this machine.

    Args:
        root, bind: As of NetLab.
        places: For Pods; one more waits.
    """

    def __init__(self, root, places=3, bind=()):
        super().__init__(root, bind, {"KUBECONFIG": f"{root}/shared/kubeconfig"})
        self.places = places
        self.pods = {}
        self.execs = []  # sockets of the commands that are running
        self.lock = threading.RLock()
        self.servers = []

    def up(self):
        super().up()
        self.boot("control")
        self.serve(self._socket_on("control"), "kubeconfig")
        self.serve(socket.create_server(("127.0.0.1", 0)), "kubeconfig.here")

    def serve(self, listening, name):
        """Answer on a socket; the kubeconfig that says where is shared/NAME."""
        host, port = listening.getsockname()
        server = ThreadingHTTPServer((host, port), partial(Handler, self), bind_and_activate=False)
        server.daemon_threads = True
        server.socket.close()
        server.socket = listening
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.servers.append(server)
        cluster = {"name": "lab", "cluster": {"server": f"http://{host}:{port}"}}
        context = {"name": "lab", "context": {"cluster": "lab", "user": "u", "namespace": "default"}}
        kubeconfig = {"apiVersion": "v1", "kind": "Config", "current-context": "lab", "clusters": [cluster]}
        kubeconfig |= {"contexts": [context], "users": [{"name": "u", "user": {"token": "t"}}]}
        (self.root / "shared" / name).write_text(json.dumps(kubeconfig))

    def down(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()
        super().down()

    def cut(self):
        """Break the connections of all running commands, as a gateway does; the commands go on."""
        with self.lock:
            broken, self.execs = self.execs, []
        for connection in broken:
            connection.shutdown(socket.SHUT_RDWR)
        return len(broken)

    def create(self, namespace, pod):
        about = pod.setdefault("metadata", {})
        name = about.get("name") or about["generateName"] + uuid.uuid4().hex[:5]
        if (namespace, name) in self.pods:
            raise ApiError(409, "AlreadyExists", f'pods "{name}" already exists')
        if not pod.get("spec", {}).get("containers"):
            raise ApiError(422, "Invalid", "spec.containers: Required value")
        check_labels(about)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        about |= {"name": name, "namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": created}
        why = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no place"}
        pod |= {"apiVersion": "v1", "kind": "Pod", "status": {"phase": "Pending", "conditions": [why]}}
        with self.lock:
            self.pods[namespace, name] = pod
        threading.Thread(target=self._start, args=(namespace, name), daemon=True).start()
        return pod

    def delete(self, namespace, name):
        with self.lock:
            pod = self.pods.pop((namespace, name))
            if name in self.init:
                self.power_off(name)
            owned = [key for key, each in self.pods.items() if pod["metadata"]["uid"] in _owners(each)]
            for each in owned:  # the garbage collector
                self.delete(*each)
            for waiting in [key for key, each in self.pods.items() if each["status"]["phase"] == "Pending"]:
                threading.Thread(target=self._start, args=waiting, daemon=True).start()
        return pod

    def fail(self, namespace, name):
        """A Pod is lost with its machine: the API keeps it, as failed."""
        with self.lock:
            self.power_off(name)
            self.pods[namespace, name]["status"]["phase"] = "Failed"

    def _start(self, namespace, name):
        with self.lock:
            pod = self.pods.get((namespace, name))
            if pod is None or pod["status"]["phase"] != "Pending" or len(self.init) > self.places:
                return
            self.boot(name)
            self.run(name, "mkdir", "-p", "/tmp/home")
            box = pod["spec"]["containers"][0]
            command = [*box.get("command", ["sleep", "infinity"]), *box.get("args", [])]
            env = {each["name"]: each.get("value", "") for each in box.get("env", []) if "value" in each}
            process = self.spawn(name, *command, log=self.root / "log" / name, env={"HOME": "/tmp/home", **env})
            running = {"name": box["name"], "image": box.get("image", ""), "imageID": "", "ready": True}
            running |= {"restartCount": 0, "state": {"running": {}}}
            pod["status"] = {"phase": "Running", "podIP": self.address[name], "containerStatuses": [running]}
        code = process.wait()
        with self.lock:
            if self.pods.get((namespace, name)) is pod:
                pod["status"]["phase"] = "Failed" if code else "Succeeded"

    def _socket_on(self, host):
        """A listening socket of a host, for this process: a socket stays in the namespace in which it was made."""
        made = []

        def make():
            with open(f"/proc/{self.init[host]}/ns/net") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):  # of this thread
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.create_server((self.address[host], PORT)))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]


class ApiError(Exception):
    def __init__(self, code, reason, message):
        super().__init__(message)
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self.status |= {"message": message, "reason": reason, "metadata": {}}


def check_labels(about):
    """A server refuses other values, and Ray's tags are put into labels."""
    for key, value in (about.get("labels") or {}).items():
        if value and not re.fullmatch(r"(?=.{1,63}$)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", value):
            raise ApiError(422, "Invalid", f"metadata.labels: Invalid value: {value!r} of {key}")


def merge(old, patch):
    """RFC 7386."""
    if not isinstance(patch, dict) or not isinstance(old, dict):
        return patch
    kept = {key: value for key, value in old.items() if patch.get(key, ...) is not None}
    return kept | {key: merge(old.get(key), value) for key, value in patch.items() if value is not None}


def selected(labels, selector):
    wanted = dict(term.split("=", 1) for term in selector.split(",") if term)
    return wanted.items() <= labels.items()


def _owners(pod):
    return [each["uid"] for each in pod["metadata"].get("ownerReferences", [])]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, lab, *args):
        self.lab = lab
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def answer(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if url.path in DISCOVERY:
                return self.send(200, DISCOVERY[url.path])
            # /api/v1/namespaces/NAMESPACE/pods[/NAME[/exec]]
            words = url.path.strip("/").split("/")
            if words[:3] != ["api", "v1", "namespaces"] or len(words) < 5 or words[4] != "pods":
                raise ApiError(404, "NotFound", f"the server could not find the requested resource {url.path}")
            namespace, name, below = words[3], *(words[5:] + ["", ""])[:2]
            return self.about_pods(namespace, name, below, query, json.loads(raw) if raw else {})
        except ApiError as error:
            return self.send(error.code, error.status)

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def about_pods(self, namespace, name, below, query, body):
        lab = self.lab
        if not name and self.command == "POST":
            return self.send(201, lab.create(namespace, body))
        with lab.lock:
            if not name:
                selector = query.get("labelSelector", [""])[0]
                found = [pod for (where, _), pod in lab.pods.items() if where == namespace]
                found = [pod for pod in found if selected(pod["metadata"].get("labels") or {}, selector)]
                return self.send(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found})
            if (namespace, name) not in lab.pods:
                raise ApiError(404, "NotFound", f'pods "{name}" not found')
            pod = lab.pods[namespace, name]
            if self.command == "DELETE":
                return self.send(200, lab.delete(namespace, name))
            if self.command == "PATCH":
                check_labels(body.get("metadata", {}))
                pod["metadata"] = merge(pod["metadata"], body.get("metadata", {}))
            if below != "exec":
                return self.send(200, pod)
            if pod["status"]["phase"] != "Running":
                raise ApiError(400, "BadRequest", f"pod {name} does not have a host assigned")
        return self.execute(name, query)

    def send(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def execute(self, host, query):
        """A command over a WebSocket: one binary message for each piece, of which the first byte is the channel."""
        key = self.headers.get("Sec-WebSocket-Key")
        offered = [each.strip() for each in self.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        protocol = next((each for each in PROTOCOLS if each in offered), None)
        if not key or not protocol:
            raise ApiError(400, "BadRequest", f"exec needs a WebSocket with one of {PROTOCOLS}")
        accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
        self.send_response(101)
        for header in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)):
            self.send_header(*header)
        self.send_header("Sec-WebSocket-Protocol", protocol)
        self.end_headers()
        self.close_connection = True
        with self.lab.lock:
            self.lab.execs.append(self.connection)
        process = subprocess.Popen(
            self.lab.enter(host) + query["command"],
            env=self.lab.env | {"HOME": "/tmp/home"},
            stdin=subprocess.PIPE if "stdin" in query else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        one = threading.Lock()

        def send(opcode, data):
            size = len(data)
            length = bytes([size]) if size < 126 else struct.pack(">BH", 126, size)  # pieces are under 64 KiB
            with one:
                self.wfile.write(bytes([0x80 | opcode]) + length + data)
                self.wfile.flush()

        def pump(pipe, channel):
            try:
                while data := os.read(pipe.fileno(), 16384):
                    send(2, bytes([CHANNELS[channel]]) + data)
            except OSError:  # nobody listens any more
                process.kill()

        threads = [threading.Thread(target=pump, args=(process.stdout, "out"))]
        threads.append(threading.Thread(target=pump, args=(process.stderr, "err")))
        threading.Thread(target=self.receive, args=(process, send), daemon=True).start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        code = process.wait()
        status = {"metadata": {}, "status": "Success"}
        if code:
            causes = [{"reason": "ExitCode", "message": str(code)}]
            status |= {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}
        try:
            send(2, bytes([CHANNELS["status"]]) + json.dumps(status).encode())
            send(8, struct.pack(">H", 1000))
        except OSError:
            pass
        with self.lab.lock:
            if self.connection in self.lab.execs:
                self.lab.execs.remove(self.connection)

    def receive(self, process, send):
        while len(head := self.rfile.read(2)) == 2 and head[0] & 15 != 8:
            size = head[1] & 127
            if size > 125:
                size = int.from_bytes(self.rfile.read(2 if size == 126 else 8), "big")
            mask = int.from_bytes(self.rfile.read(4), "big")
            data = unmasked(self.rfile.read(size), mask)
            if head[0] & 15 == 9:  # ping
                send(10, data)
            elif process.stdin and data[:1] == b"\0" and len(data) > 1:
                process.stdin.write(data[1:])
                process.stdin.flush()
            elif process.stdin and data == b"\xff\0":  # v5: stdin is closed
                process.stdin.close()


def unmasked(data, mask):
    size = len(data)
    repeated = (mask.to_bytes(4, "big") * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")
