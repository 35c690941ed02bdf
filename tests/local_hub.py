"""A small Hugging Face Hub on loopback: create, upload, list and resolve, for the real client."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories in memory, served over HTTP while the context lasts.

    Attributes:
        files: Contents by repository and path.
        log: Method and path of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.log: list[str] = []

    def __enter__(self) -> 'Hub':
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *args) -> None:
                pass

            def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in {'Content-Length': str(len(body)), **headers}.items():
                    self.send_header(name.replace('_', '-'), value)
                self.end_headers()
                if self.command != 'HEAD':
                    self.wfile.write(body)

            def json(self, data, status: int = 200, **headers: str) -> None:
                self.answer(json.dumps(data).encode(), status, Content_Type='application/json', **headers)

            def do_POST(self) -> None:
                hub.log.append(f'POST {self.path}')
                body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
                if self.path == '/api/repos/create':
                    name = json.loads(body)['name']
                    repo = f'{json.loads(body).get("organization") or "user"}/{name}'
                    hub.files.setdefault(repo, {})
                    return self.json({'url': f'{hub.url}/{repo}', 'id': repo})
                if self.path == '/api/validate-yaml':
                    return self.json({'errors': [], 'warnings': []})
                if found := re.fullmatch(r'/api/models/(.+)/preupload/main', self.path.split('?')[0]):
                    return self.json({'files': [
                        {'path': f['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                        for f in json.loads(body)['files']]})
                if found := re.fullmatch(r'/api/models/(.+)/commit/main', self.path.split('?')[0]):
                    for line in body.splitlines():
                        entry = json.loads(line)
                        if entry['key'] == 'file':
                            content = base64.b64decode(entry['value']['content'])
                            hub.files[found[1]][entry['value']['path']] = content
                    return self.json({
                        'success': True, 'commitOid': hub.commit(found[1]),
                        'commitUrl': f'{hub.url}/{found[1]}/commit/{hub.commit(found[1])}'})
                return self.json({'error': 'not found'}, 404)

            def do_GET(self) -> None:
                hub.log.append(f'{self.command} {self.path}')
                path = self.path.split('?')[0]
                if found := re.fullmatch(r'/([^/]+/[^/]+)/resolve/[^/]+/(.+)', path):
                    content = hub.files.get(found[1], {}).get(found[2])
                    if content is None:
                        return self.json({'error': 'not found'}, 404, X_Error_Code='EntryNotFound')
                    return self.answer(
                        content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=hub.commit(found[1]))
                if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)/tree/[^/]+/?', path):
                    return self.json([
                        {'type': 'file', 'path': name, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest()}
                        for name, data in hub.files[found[1]].items()])
                if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)(/revision/[^/]+)?', path):
                    return self.json({
                        'id': found[1], 'sha': hub.commit(found[1]), 'private': False, 'tags': [], 'downloads': 0,
                        'likes': 0, 'siblings': [{'rfilename': name} for name in hub.files[found[1]]]})
                return self.json({'error': 'not found'}, 404)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        """A commit id that follows the contents."""
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()
