"""The part of the Hugging Face Hub's HTTP interface that publishing and loading a model need, on this machine."""
import base64
import hashlib
import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = 'hf_thisIsASecret'
COMMIT = 'c' * 40


class HubServer(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repos: Each repository's files, content by name.
        objects: Large files by SHA-256.
        requests: How often each kind of request was answered.
        revisions: Those of which a file was asked for.
        refuse_commits: Number of commits that are refused.
        tamper: Whether a byte of each large file is changed on its way out.
        cut_at: Number of bytes of a large file after which the connection breaks, once.
        stall_at: Number of bytes of a large file after which nothing more comes, once.
    """
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.revisions: set[str] = set()
        self.refuse_commits = 0
        self.tamper = False
        self.cut_at: int | None = None
        self.stall_at: int | None = None

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args) -> None:
        pass

    def answer(self, content: object = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {'Content_Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def do_POST(self) -> None:
        body = self.body()
        path = self.path.partition('?')[0]
        if path != '/api/validate-yaml' and self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self.answer({'error': 'Invalid username or password.'}, 401)
        if path == '/api/validate-yaml':
            return self.answer({'errors': [], 'warnings': []})
        if path == '/api/repos/create':
            asked = json.loads(body)
            name = '/'.join(filter(None, (asked.get('organization'), asked['name'])))
            exists = name in self.server.repos
            self.server.repos.setdefault(name, {})
            return self.answer({'url': f'{self.server.url}/{name}', 'name': name}, 409 if exists else 200)
        if match := re.fullmatch('/api/models/(.+?)/preupload/main', path):
            return self.answer({'files': [
                {'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith('.safetensors') else 'regular',
                 'shouldIgnore': False} for f in json.loads(body)['files']]})
        if re.fullmatch('/(.+?).git/info/lfs/objects/batch', path):
            return self.answer({'transfer': 'basic', 'objects': [
                {'oid': o['oid'], 'size': o['size'], **({} if o['oid'] in self.server.objects else {
                    'actions': {'upload': {'href': f'{self.server.url}/objects/{o["oid"]}'}}})}
                for o in json.loads(body)['objects']]})
        if match := re.fullmatch('/api/models/(.+?)/commit/main', path):
            if self.server.refuse_commits:
                self.server.refuse_commits -= 1
                return self.answer({'error': 'This commit is refused.'}, 400)
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
            return self.answer({'commitUrl': f'{self.server.url}/{match[1]}/commit/{COMMIT}', 'commitOid': COMMIT})
        self.answer({'error': f'unknown: {path}'}, 404)

    def commit(self, repo: str, lines: list[dict]) -> None:
        files = self.server.repos[repo]
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.server.objects[value['oid']]
        self.server.requests['commit'] += 1

    def do_PUT(self) -> None:
        content, oid = self.body(), self.path.rpartition('/')[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer({'error': 'content does not match its hash'}, 400)
        self.server.objects[oid] = content
        self.server.requests['upload'] += 1
        self.answer()

    def do_GET(self) -> None:
        match = re.fullmatch('/(.+?)/resolve/([^/]+)/(.+)', self.path.partition('?')[0])
        files = self.server.repos.get(match[1], {}) if match else {}
        if not match or match[3] not in files:
            return self.answer(status=404, X_Error_Code='EntryNotFound')
        self.server.revisions.add(match[2])
        content = files[match[3]]
        etag = hashlib.sha256(content).hexdigest()
        if self.server.tamper and match[3].endswith('.safetensors'):
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = dict(ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges='bytes')
        if self.command == 'HEAD' or not match[3].endswith('.safetensors'):
            return self.answer(content, **headers)
        start = int(self.headers.get('Range', 'bytes=0-')[len('bytes='):].split('-')[0])
        self.server.requests['resumed download' if start else 'download'] += 1
        if start:
            return self.answer(
                content[start:], 206, Content_Range=f'bytes {start}-{len(content) - 1}/{len(content)}', **headers)
        stop, self.server.cut_at = self.server.cut_at, None
        stall, self.server.stall_at = self.server.stall_at, None
        if stop is None and stall is None:
            return self.answer(content, **headers)
        self.answer(content[:stop or stall], **headers, Content_Length=str(len(content)))
        if stall:
            self.wfile.flush()
            self.server.requests['stalled download'] += 1
            self.rfile.read(1)  # until the client is gone
        self.close_connection = True

    do_HEAD = do_GET
