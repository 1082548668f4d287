#!/usr/bin/env python3
"""Tests of socks.py, with real sockets on loopback.  Run them: python -m test_socks

Several processes share them; -j 1 takes one.  Classes and tests can be named, for example
python -m test_socks WireTest RelayTest.test_idle; one process runs these.

Measure it beside other servers: python -m test_socks bench

Programs that some tests talk to (curl, ssh, nc, ncat, proxychains4, unshare) are used where they
are installed; elsewhere those tests are skipped and say so.
"""

import argparse
import array
import asyncio
import atexit
import concurrent.futures
import contextlib
import ctypes.util
import copy
import errno
import faulthandler
import ftplib
import functools
import gc
import hashlib
import http.client
import http.server
import inspect
import importlib
import io
import ipaddress
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import platform
import py_compile
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unittest
import unittest.mock
import urllib.request
import warnings
import weakref

try:
    import pwd
    import resource
except ImportError:                     # Windows
    pwd = resource = None

import socks
from socks import (Address, Choice, Credentials, Datagram, Greeting, GssMessage, Message6, Option,
                   ProtocolError, Reply, Request, Request4, Request6, Response, Response4,
                   Response6, Settings, StreamedDatagram, Verdict, Verdict6)

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, 'socks.py')
LONGEST = 200                           # seconds for one test, on a busy machine
PATIENCE = 30                           # seconds until something that must happen counts as failed
HTTP = b'GET / HTTP/1.0\r\n\r\n'


# ---------------------------------------------------------------------------------------- helpers

def eventually(condition):
    """Wait until condition() is true, and return that."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.002)
    raise AssertionError('it never became true')


def ready(reading, writing, seconds):
    """Those of the sockets that are ready within so many seconds."""
    return socks.poll(reading, writing, time.monotonic() + seconds)


def takes_connections(host):
    """Whether one can listen on an address, and connect to it."""
    try:
        with socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET) as sock:
            sock.bind((host, 0))
            sock.listen(1)
            with socket.create_connection(sock.getsockname()[:2], PATIENCE):
                return True
    except OSError:
        return False


def hashed_text(password, salt=b'', rounds=1):
    """The text of a `Hashed` that takes little time."""
    digest = hashlib.pbkdf2_hmac('sha256', password, salt, rounds)
    return f'pbkdf2:{rounds}:{salt.hex()}:{digest.hex()}'


def has_family(family):
    try:
        socket.socket(family).close()
        return True
    except OSError:
        return False


HAS_IPV6 = takes_connections('::1')
# What a target is that only IPv6 would lead to: a kernel may lack the family itself.
NO_IPV6_ROUTE = (Reply.NETWORK_UNREACHABLE if has_family(socket.AF_INET6) else
                 Reply.ADDRESS_TYPE_NOT_SUPPORTED)
needs_ipv6 = unittest.skipUnless(HAS_IPV6, 'there is no IPv6 here')


def possible(host):
    """The host; skips the test if it is an IPv6 address and there is no IPv6 here."""
    if ':' in host and not HAS_IPV6:
        raise unittest.SkipTest('there is no IPv6 here')
    return host


# What the system says of `localhost` differs: 127.0.0.1, ::1 before it, or one of them.  In this
# process it is 127.0.0.1, but where a test says otherwise.
system_getaddrinfo = socket.getaddrinfo


def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0, localhost=('127.0.0.1',)):
    name = host.decode('latin-1') if isinstance(host, (bytes, bytearray)) else host
    if not isinstance(name, str) or name.lower().rstrip('.') != 'localhost':
        return system_getaddrinfo(host, port, family, type, proto, flags)
    found = []
    for ip in localhost:
        if family in (0, socket.AF_INET6 if ':' in ip else socket.AF_INET):
            found += system_getaddrinfo(ip, port, family, type, proto,
                                        flags & ~socket.AI_ADDRCONFIG)
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, 'localhost has no such address')
    return found


def resolve(address):
    return socks.run(socks.resolve(address))


def dial(addresses, seconds, source=()):
    return socks.run(socks.dial(addresses, socks.deadline(seconds), source))


def descriptors():
    """The open descriptors of this process, as far as the system tells."""
    with contextlib.suppress(OSError):
        return len(os.listdir('/proc/self/fd'))
    return 0


def cpu_seconds(*pids):
    """What processes have used, with their children that ended; not a number without any."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f'/proc/{pid}/stat') as file:
            ticks += sum(map(int, file.read().rpartition(')')[2].split()[11:15]))
    return ticks / os.sysconf('SC_CLK_TCK') if pids else float('nan')


def hexed(text, **ports):
    """The bytes of a vector: hex digits, `61*300` for 300 bytes, `{port}` for a port."""
    for name, number in ports.items():
        text = text.replace('{%s}' % name, '%04x' % number)
    text = re.sub(r'([0-9a-f]{2})\*(\d+)', lambda m: m.group(1) * int(m.group(2)), text)
    return bytes.fromhex(text)


def pieces(data, size=None):
    """The data in pieces of so many bytes, or in one."""
    size = size or len(data) or 1
    return [data[start:start + size] for start in range(0, len(data), size)]


def random_bytes(source, size):
    """So many bytes of a random.Random."""
    return source.getrandbits(8 * size).to_bytes(size, 'big') if size else b''


def pattern(text, **ports):
    """The regular expression of a vector's answer: `..` is any byte, `!00` any but 00, a final `~`
    says that more may follow."""
    for name, number in ports.items():
        text = text.replace('{%s}' % name, '%04x' % number)
    items = re.findall(r'!00|\.\.|[0-9a-f]{2}', text.replace(' ', ''))
    byte = {'..': b'.', '!00': b'[^\0]'}
    return b''.join(byte.get(item) or re.escape(bytes.fromhex(item)) for item in items)


@functools.lru_cache(None)
def compiled():
    """The folder of a compiled socks.py: to compile it takes longer than the rest of a start."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, True)
    py_compile.compile(SCRIPT, os.path.join(folder, 'socks.pyc'), doraise=True)
    return folder


def socks_py(*arguments):
    """The command that runs socks.py with these arguments."""
    return (sys.executable, os.path.join(compiled(), 'socks.pyc'), *arguments)


class Peer:
    """One side of a connection, with a time-out and exact reads."""

    def __init__(self, sock_or_address, source=None):
        if isinstance(sock_or_address, tuple):
            self.sock = socket.create_connection(sock_or_address[:2], PATIENCE, source)
        else:
            self.sock = sock_or_address
            self.sock.settimeout(PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.sock.close()

    def send(self, data, step=None):
        """Send data, so many bytes at a time."""
        for piece in pieces(data, step):
            self.sock.sendall(piece)

    def send_on(self, data):
        """Send data again and again, until that fails."""
        while True:
            self.sock.sendall(data)

    def read(self, n):
        data = b''
        while len(data) < n:
            more = self.sock.recv(n - len(data))
            if not more:
                raise EOFError(f'{n} bytes expected, then came {data!r} and the end')
            data += more
        return data

    def rest(self):
        """All up to the end."""
        return b''.join(iter(lambda: self.sock.recv(65536), b''))

    def finish(self):
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.sock.close()

    def ask(self, message, answer_class):
        self.send(message.pack())
        return answer_class.unpack(self.read)

    def begin(self, command, address):
        """Send a SOCKS5 request."""
        self.ask(Greeting(b'\0'), Choice)
        self.send(Request(command, address).pack())

    def request(self, command, address):
        """The response to a SOCKS5 request."""
        self.begin(command, address)
        return Response.unpack(self.read)

    def connect(self, host, port):
        """The response to a SOCKS5 CONNECT."""
        return self.request(socks.Command.CONNECT, Address(host, port))


def echo(peer):
    """Send back what comes; HTTP gets a page."""
    for data in iter(lambda: peer.sock.recv(65536), b''):
        if data.startswith(b'G'):
            peer.read(len(HTTP) - len(data))
            return peer.send(b'HTTP/1.0 200 OK\r\n\r\nhello')
        peer.send(data)


def name_of(host):
    """What a look-up is for, as text without the final dot."""
    return (host.decode() if isinstance(host, bytes) else host or '').rstrip('.')


def unused_port():
    """A port for a program to listen on, below those that systems give to whoever asks for any: one
    of these might be somebody else's before the program has it."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as sock, socks.bound_udp(
                Address('127.0.0.1', port)):
            sock.bind(('127.0.0.1', port))
            return port


def children(pid, text=''):
    """The processes that it has started and whose command lines contain `text`, by number."""
    if not os.path.exists(f'/proc/self/task/{os.getpid()}/children'):
        raise unittest.SkipTest('there is no /proc')
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f'/proc/{pid}/task'):
            with open(f'/proc/{pid}/task/{task}/children') as file:
                found += map(int, file.read().split())
    return [each for each in found if text in open_text(f'/proc/{each}/cmdline')]


def has_ended(pid):
    """Whether a process has, even if nothing has waited for it."""
    return open_text(f'/proc/{pid}/stat').rpartition(')')[2][:2] in ('', ' Z')


def listens(port):
    """Whether somebody does on 127.0.0.1."""
    with socket.socket() as sock:
        return not sock.connect_ex(('127.0.0.1', port))


class Origin(socketserver.ThreadingTCPServer):
    """A target: serves each connection by function(peer); without one, the test takes it from
    `peers` and speaks itself."""
    allow_reuse_address = True
    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, function=None, host='127.0.0.1', port=0):
        self.address_family = socket.AF_INET6 if ':' in possible(host) else socket.AF_INET
        self.function = function
        self.peers, self.accepted = [], []
        self.threads = []
        self.errors = []
        super().__init__(Address(host, port).sockaddr, None)
        self.port = self.server_address[1]
        self.threads.append(threading.Thread(target=self.serve_forever, args=(0.01,)))
        self.threads[0].start()

    def take(self):
        """The next connection, when it is there."""
        return eventually(lambda: self.peers and self.peers.pop(0))

    def process_request(self, request, client_address):
        self.accepted.append(Peer(request))
        self.peers.append(self.accepted[-1])
        if self.function:
            super().process_request(request, client_address)

    def finish_request(self, request, client_address):
        self.threads.append(threading.current_thread())
        with contextlib.suppress(OSError, EOFError):
            self.function(next(peer for peer in self.accepted if peer.sock is request))

    def handle_error(self, request, client_address):
        """A check in the function failed; the test fails at its end."""
        self.errors.append(sys.exc_info()[1])

    def __exit__(self, *exc_info):
        self.shutdown()
        self.server_close()
        for peer in self.accepted:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE)
        for peer in self.accepted:
            peer.sock.close()
        for error in self.errors:
            raise error


# Python 3.6 has it by another name.
thread_time = getattr(time, 'thread_time', None) or hasattr(
    time, 'CLOCK_THREAD_CPUTIME_ID') and functools.partial(
    time.clock_gettime, time.CLOCK_THREAD_CPUTIME_ID)


class Watch:
    """Steps of loops, that is calls on behalf of one item, that took more than LIMIT seconds of
    their thread's CPU time: what one client can ask for must not keep the others waiting.

    The time that is lost to the garbage of all other tests does not count.
    """
    LIMIT = 0.02
    # The checks of -X dev, a JIT's warming up: all of it is slower there.
    SLOWNESS = 5 if getattr(sys.flags, 'dev_mode', 0) or sys.implementation.name != 'cpython' else 1

    def __init__(self):
        self.slow = []                  # texts
        self.garbage = threading.local()

    def install(self):
        """Watch all loops of socks, from now on, if there is a clock for that."""
        if thread_time:
            self.LIMIT *= self.SLOWNESS * max(1, min(self.try_machine() for _ in range(5)) / 0.01)
            if hasattr(gc, 'callbacks'):        # PyPy's collects in small steps
                gc.callbacks.append(self.collect)
            for item in vars(socks).values():
                if isinstance(item, type) and 'ready' in vars(item):
                    item.ready = self.watched(item.ready)
            socks.Loop.attempt = self.watched(socks.Loop.attempt)

    def try_machine(self):
        """Seconds for what takes less than 0.01 on most machines."""
        before = thread_time()
        sum(number % 7 for number in range(100000))
        return thread_time() - before

    def collect(self, phase, _):
        now = thread_time()
        if phase == 'start':
            self.garbage.since = now
        else:
            since = getattr(self.garbage, 'since', now)
            self.garbage.seconds = getattr(self.garbage, 'seconds', 0) + now - since

    def cost(self):
        return thread_time() - getattr(self.garbage, 'seconds', 0)

    def watched(self, step):
        @functools.wraps(step)
        def watched(self_, *args):
            before = self.cost()
            try:
                return step(self_, *args)
            finally:
                cost = self.cost() - before
                if cost > self.LIMIT:
                    self.slow.append(f'{1000 * cost:.0f} ms of CPU time in a loop: '
                                     f'{step.__qualname__} of {self_} with {args}')
        return watched

    def check(self):
        """Fail if there was any since the last time."""
        slow, self.slow = self.slow, []
        if slow:
            raise AssertionError('\n'.join(slow))


watch = Watch()


class Case(unittest.TestCase):
    """A test that leaves no thread and no descriptor behind, and meets no bug in a loop."""

    line_handler = None                 # of serve()

    def setUp(self):
        faulthandler.dump_traceback_later(LONGEST, exit=True)       # from now on
        before = threading.active_count(), descriptors()
        self.addCleanup(watch.check)
        self.addCleanup(self.check_leaks, before)
        self.bugs = logging.Handler(logging.ERROR)
        self.bugs.records = []
        self.bugs.emit = self.bugs.records.append
        socks.log.addHandler(self.bugs)
        self.addCleanup(self.check_bugs)

    def check_bugs(self):
        socks.log.removeHandler(self.bugs)
        self.assertEqual([logging.Formatter().format(record) for record in self.bugs.records
                          if 'this is a bug' in record.getMessage()], [])

    def check_leaks(self, before):
        def is_clean():
            if sys.implementation.name == 'pypy':       # which closes what is dropped only then
                gc.collect()
            return threading.active_count() <= before[0] and descriptors() <= before[1]

        with self.subTest('leaks'):
            eventually(is_clean)

    def exchange(self, near, far, size):
        """So many bytes each way at once, and each direction ends for itself."""
        sent = [Background(pour, near, size, 1), Background(pour, far, size, 2)]
        received = [Background(drink, far), Background(drink, near)]
        for one, other in zip(sent, received):
            self.assertEqual(one.result(), other.result())

    def check_end(self, peer, may_reset=False):
        """Nothing more comes, and the connection ends."""
        with contextlib.suppress(*[ConnectionResetError] * may_reset):
            self.assertEqual(peer.rest(), b'')

    def enter(self, manager):
        """`with manager` up to the end of the test."""
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value

    def tls_pair(self):
        """A `TlsLayer` above a socket that takes little at a time, and its client's socket."""
        near, client = [self.enter(sock) for sock in socket.socketpair()]
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        layer = socks.TlsLayer(near, server_context(), server_side=True)
        with Background(lambda: client_context().wrap_socket(
                client, server_hostname='localhost')) as wrapping:
            socks.run(layer.handshake(socks.deadline(PATIENCE)))
            return layer, self.enter(wrapping.result())

    def serve(self, handler_class=socks.Handler, server_class=socks.Server, host='127.0.0.1',
              **settings):
        """A running server; its log lines come to self.lines."""
        self.lines = lines = []
        if self.line_handler:           # of another server of this test: its lines come here, too
            socks.log.removeHandler(self.line_handler)
        self.line_handler = handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        socks.log.addHandler(handler)
        self.addCleanup(socks.log.removeHandler, handler)
        settings.setdefault('login_delay', 0.02)    # else a wrong password takes a second
        server = server_class((possible(host), 0), Settings(**settings), handler_class)
        return self.enter(server.start())

    def line(self):
        """The first line that the server of serve() logs."""
        return eventually(lambda: self.lines)[0]

    def origin(self, *args, **kwargs):
        return self.enter(Origin(*args, **kwargs))

    def peer(self, *args):
        return self.enter(Peer(*args))

    def tunnel(self, server, origin):
        """Both ends of a connection through the server."""
        near = self.peer(server.server_address)
        self.assertEqual(near.connect('127.0.0.1', origin.port).reply, 0)
        return near, origin.take()

    def relay_in(self, server):
        """Its only association."""
        return eventually(lambda: [item for item in list(server.loop.items)
                                   if isinstance(item, socks.UdpRelay)])[0]

    @contextlib.contextmanager
    def busy(self, relay):
        """Keep the loop of a relay from what comes meanwhile, all of which it then finds at once.
        """
        is_busy, event = threading.Event(), threading.Event()
        relay.loop.call(relay, lambda: is_busy.set() or event.wait(PATIENCE))
        self.assertTrue(is_busy.wait(PATIENCE))
        try:
            yield
        finally:
            event.set()

    def slow_names(self):
        """Have look-ups of names under .slow wait for the event that is returned, then fail."""
        event, look_up = threading.Event(), socket.getaddrinfo

        def getaddrinfo(host, *args, **options):
            if name_of(host).endswith('.slow'):
                event.wait(PATIENCE)
                raise socket.gaierror(socket.EAI_AGAIN, 'slow')
            return look_up(host, *args, **options)

        self.addCleanup(setattr, socket, 'getaddrinfo', look_up)
        self.addCleanup(event.set)
        socket.getaddrinfo = getaddrinfo
        return event

    def names(self, find):
        """Have find(name, family) look up names under .test, and those without a dot.

        It gives IP addresses, of which those of the family count, or raises; None is for the
        system.  The result is the list of what was looked up: (name as it was asked for, family).
        """
        asked, look_up = [], socket.getaddrinfo

        def getaddrinfo(host, port, family=0, *args, **options):
            name = name_of(host)
            hosts = None
            if name.endswith('.test') or '.' not in name and ':' not in name:
                asked.append((host.decode() if isinstance(host, bytes) else host, int(family)))
                hosts = find(name, family)
            if hosts is None:
                return look_up(host, port, family, *args, **options)
            found = [(socks.family_of(each), socket.SOCK_STREAM, 6, '', (each, port))
                     for each in hosts if family in (0, socks.family_of(each))]
            if not found:
                raise socket.gaierror(socket.EAI_NONAME, 'not known')
            return found

        self.change(socket, getaddrinfo=getaddrinfo)
        return asked

    def scripted_names(self, hosts_of):
        """Have names under .test stand for the IP addresses hosts_of(name)."""
        self.names(lambda name, family: hosts_of(name) if name.endswith('.test') else None)

    def place(self, name):
        """The path of a file in a folder of the test."""
        if not hasattr(self, 'folder'):
            self.folder = self.enter(tempfile.TemporaryDirectory())
        return os.path.join(self.folder, name)

    def write(self, name, text):
        """The path of a file with this text."""
        path = self.place(name)
        with open(path, 'w', encoding='utf-8') as file:
            file.write(text)
        os.chmod(path, 0o600)
        return path

    def change(self, thing, **values):
        """Give attributes of a class or module other values up to the end of the test."""
        for name, value in values.items():
            self.addCleanup(setattr, thing, name, getattr(thing, name))
            setattr(thing, name, value)

    def refused_port(self):
        """A port that nobody listens on and nobody else can take."""
        sock = self.enter(socket.socket())
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]

    def silent_port(self):
        """A port that answers no connection attempt at all: its queue is full."""
        sock = self.enter(socket.socket())
        sock.bind(('127.0.0.1', 0))
        sock.listen(0)
        for _ in range(4):
            filler = self.enter(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(sock.getsockname())
        return sock.getsockname()[1]


def setUpModule():
    """A test that hangs shows where, and fails."""
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    logging.raiseExceptions = True
    socks.log.setLevel(logging.INFO)
    socket.getaddrinfo = socks._orig_getaddrinfo = socks.getaddrinfo.stock = getaddrinfo
    socks.raise_descriptor_limit()
    for name in list(os.environ):       # what programs would obey
        if name.lower().endswith('_proxy') or name in ('SOCKS_USERS', 'NOTIFY_SOCKET',
                                                       'WATCHDOG_USEC', 'JOURNAL_STREAM'):
            del os.environ[name]
    watch.install()


def tearDownModule():
    faulthandler.cancel_dump_traceback_later()
    socket.getaddrinfo = system_getaddrinfo
    watch.check()


# ------------------------------------------------------------------------------------ wire format

# Typed from the specifications, not made by pack(): each is read and written, see WireTest.
MESSAGES = [
    ('greeting', Greeting(b'\0'), '050100'),
    ('greeting, three methods', Greeting(b'\0\1\2'), '0503000102'),
    ('greeting without methods', Greeting(b''), '0500'),
    ('greeting, all methods', Greeting(bytes(range(255))), '05ff' + bytes(range(255)).hex()),
    ('choice', Choice(2), '0502'),
    ('no acceptable method', Choice(255), '05ff'),
    ('credentials', Credentials(b'bob', b'secret'), '0103626f6206736563726574'),
    ('credentials, empty', Credentials(b'', b''), '010000'),
    ('credentials, longest', Credentials(b'u' * 255, b'p' * 255), '01ff 75*255 ff 70*255'),
    ('credentials, UTF-8', Credentials('用户'.encode(), '密码'.encode()),
     '0106e794a8e688b706e5af86e7a081'),
    ('accepted', Verdict(0), '0100'),
    ('not accepted', Verdict(1), '0101'),
    ('request, IPv4', Request(1, Address('127.0.0.1', 80)), '050100017f0000010050'),
    ('request, IPv6', Request(2, Address('2001:db8::1', 443)),
     '0502000420010db800000000000000000000000101bb'),
    ('request, name', Request(3, Address('example.com', 443)),
     '050300030b6578616d706c652e636f6d01bb'),
    ('request, longest name', Request(1, Address('a' * 255, 1)), '05010003ff 61*255 0001'),
    ('request, unknown command', Request(0x99, Address('0.0.0.0', 0)), '05990001000000000000'),
    ('response', Response(0, Address('10.0.0.1', 1080)), '050000010a0000010438'),
    ('response, refused', Response(5), '05050001000000000000'),
    ('response, unknown code', Response(0xF0), '05f00001000000000000'),
    ('response, IPv6', Response(0, Address('::1', 7)),
     '0500000400000000000000000000000000000001 0007'),
    ('response, name', Response(0, Address('a', 0)), '0500000301610000'),
    ('SOCKS4', Request4(1, Address('127.0.0.1', 80)), '040100507f00000100'),
    ('SOCKS4, userid', Request4(2, Address('1.2.3.4', 80), b'bob'), '0402005001020304626f6200'),
    ('SOCKS4a', Request4(1, Address('localhost', 80), b'bob'),
     '0401005000000001626f62006c6f63616c686f737400'),
    ('SOCKS4, longest userid', Request4(1, Address('1.2.3.4', 1), b'a' * 512),
     '0401000101020304 61*512 00'),
    ('SOCKS4 granted', Response4(0x5a, Address('1.2.3.4', 80)), '005a005001020304'),
    ('SOCKS4 rejected', Response4(0x5b), '005b000000000000'),
    ('SOCKS6, IPv4', Request6(1, Address('127.0.0.1', 80)), '0601 0000 0050 00 01 7f000001'),
    ('SOCKS6, IPv6', Request6(2, Address('2001:db8::1', 443)),
     '0602 0000 01bb 00 04 20010db8000000000000000000000001'),
    ('SOCKS6, name that fits', Request6(3, Address('example.org', 80)),
     '0603 0000 0050 00 03 0b 6578616d706c652e6f7267'),
    ('SOCKS6, name with padding', Request6(1, Address('localhost', 80)),
     '0601 0000 0050 00 03 0b 6c6f63616c686f7374 0000'),
    ('SOCKS6, name of 253', Request6(1, Address('a' * 253, 1)),
     '0601 0000 0001 00 03 ff 61*253 0000'),
    ('SOCKS6, name of 255', Request6(1, Address('a' * 255, 1)), '0601 0000 0001 00 03 ff 61*255'),
    ('SOCKS6, NOOP', Request6(0, Address('0.0.0.0', 0)), '0600 0000 0000 00 01 00000000'),
    ('SOCKS6, credentials', Request6(1, Address('127.0.0.1', 80), (
        Option(4, b'\2\1\3bob\6secret\0\0\0'),)),
     '0601 0014 0050 00 01 7f000001 0004 0014 02 01 03 626f62 06 736563726574 000000'),
    ('SOCKS6, options', Request6(1, Address('127.0.0.1', 80), (
        Option(2, b'\1\0\2\0'), Option(1, b'\x81\1\x10\0'), Option(64512, b''))),
     '0601 0014 0050 00 01 7f000001 0002 0008 0100 02 00 0001 0008 81 01 10 00 fc00 0004'),
    ('SOCKS6, most options', Request6(1, Address('1.2.3.4', 1), (Option(9, b''),) * 5120),
     '0601 5000 0001 00 01 01020304' + '0009 0004' * 5120),
    ('SOCKS6 login', Verdict6(0), '0600 0000'),
    ('SOCKS6 login, password', Verdict6(0, (Option(4, b'\2\1\0\0'),)),
     '0600 0008 0004 0008 02 01 00 00'),
    ('SOCKS6 login, method', Verdict6(1, (Option(3, b'\2\0\0\0'),)),
     '0601 0008 0003 0008 02 000000'),
    ('SOCKS6 reply', Response6(0, Address('10.0.0.1', 1080)), '0600 0000 0438 00 01 0a000001'),
    ('SOCKS6 reply, timed out', Response6(9), '0609 0000 0000 00 01 00000000'),
    ('SOCKS6 reply, IPv6 and option', Response6(0, Address('::1', 7), (Option(1, b'\x81\2\2\0'),)),
     '0600 0008 0007 00 04 00*15 01 0001 0008 81 02 02 00'),
    ('SOCKS6 association', Message6(1, b'12345678'), '0601 000c 3132333435363738'),
    ('SOCKS6 association, confirmed', Message6(2, b'12345678'), '0602 000c 3132333435363738'),
    ('SOCKS6 datagram', Message6(3, b'12345678', hexed('000000 01 7f000001 0050 6162')),
     '0603 0016 3132333435363738 01 00 0050 7f000001 6162'),
    ('SOCKS6 datagram, name', Message6(3, b'12345678', hexed('000000 03 03 612e62 0050')),
     '0603 0014 3132333435363738 03 00 0050 03 612e62'),
    ('SOCKS6 datagram, name with padding', Message6(
        3, b'12345678', hexed('000000 03 02 612e 0050 61')),
     '0603 0015 3132333435363738 03 00 0050 03 612e00 61'),
    ('SOCKS6 datagram, IPv6, empty', Message6(3, b'12345678', hexed('000000 04 00*15 01 0050')),
     '0603 0020 3132333435363738 04 00 0050 00*15 01'),
    ('PROXY, IPv4', socks.ProxyHeader(Address('127.0.0.1', 59416), Address('127.0.0.1', 13502)),
     '0d0a0d0a000d0a515549540a 2111000c 7f000001 7f000001 e818 34be'),
    ('PROXY, IPv6', socks.ProxyHeader(Address('::1', 1), Address('2001:db8::2', 2)),
     '0d0a0d0a000d0a515549540a 21210024 00000000000000000000000000000001'
     '20010db8000000000000000000000002 0001 0002'),
    ('datagram in TCP', StreamedDatagram(hexed('000000017f00000146a16f6e65')),
     '0003 0a 017f00000146a1 6f6e65'),
    ('datagram in TCP, name', StreamedDatagram(hexed('00000003096c6f63616c686f737400357879')),
     '0002 10 03096c6f63616c686f73740035 7879'),
    ('datagram in TCP, IPv6, empty', StreamedDatagram(hexed('00000004 00*15 01 0035')),
     '0000 16 04 00*15 01 0035'),
    ('datagram in TCP, longest name', StreamedDatagram(hexed('00000003f8 61*248 0035 62')),
     '0001 ff 03f8 61*248 0035 62'),
    ('GSSAPI token', GssMessage(1, b'abc'), '01010003616263'),
    ('GSSAPI token, empty', GssMessage(1), '01010000'),
    ('GSSAPI token, longest', GssMessage(3, b'a' * 65535), '0103ffff 61*65535'),
    ('GSSAPI abort', GssMessage(255), '01ff'),
    ('PROXY, none', socks.ProxyHeader(), '0d0a0d0a000d0a515549540a 20000000'),
]

# Accepted although no pack() writes them so.
LENIENT = [
    ('request, RSV not 0', Request(1, Address('127.0.0.1', 80)), '050101017f0000010050'),
    ('request, IPv4 as name', Request(1, Address('127.0.0.1', 80)),
     '05010003093132372e302e302e310050'),
    ('request, empty name', Request(3, Address('', 0)), '05030003000000'),
    ('request, NUL in name', Request(1, Address('a\0b', 80)), '0501000303 610062 0050'),
    ('request, name not UTF-8', Request(1, Address('\udcff', 80)), '0501000301ff0050'),
    ('SOCKS4a, any x', Request4(1, Address('a', 80)), '04010050000000ff006100'),
    ('SOCKS4a, IPv6 as name', Request4(1, Address('::1', 80)), '0401005000000001003a3a3100'),
    ('SOCKS4a, empty name', Request4(1, Address('', 80)), '0401005000000001 00 00'),
    ('SOCKS4, zeros are no SOCKS4a', Request4(1, Address('0.0.0.0', 80)), '040100500000000000'),
    ('SOCKS4 reply with version 4', Response4(0x5a), '045a000000000000'),
    ('verdict other than 1', Verdict(255), '01ff'),
    ('SOCKS6, length without padding', Request6(1, Address('localhost', 80)),
     '0601 0000 0050 00 03 09 6c6f63616c686f7374 0000'),
    ('SOCKS6, RSV not 0', Request6(1, Address('127.0.0.1', 80)), '0601 0000 0050 99 01 7f000001'),
    ('SOCKS6, NUL in name', Request6(1, Address('a\0b', 80)), '0601 0000 0050 00 03 03 610062'),
    ('SOCKS6, empty name', Request6(1, Address('', 80)), '0601 0000 0050 00 03 00 000000'),
    ('SOCKS6, IPv4 as name', Request6(1, Address('1.2.3.4', 80)),
     '0601 0000 0050 00 03 07 312e322e332e34'),
    ('SOCKS6 error message', Message6(4, b'12345678'), '0604 0010 3132333435363738 01000050'),
    ('SOCKS6 datagram of type 2', Message6(3, b'12345678'),
     '0603 0014 3132333435363738 02 00 0050 7f000001'),
    ('SOCKS6 datagram cut off', Message6(3, b'12345678'),
     '0603 0012 3132333435363738 01 00 0050 7f00'),
    ('PROXY 1', socks.ProxyHeader(Address('127.0.0.1', 48604), Address('127.0.0.1', 13501)),
     b'PROXY TCP4 127.0.0.1 127.0.0.1 48604 13501\r\n'.hex()),
    ('HTTP status', socks.HttpStatus(200, 'Connection established'),
     b'HTTP/1.1 200 Connection established\r\n'.hex()),
    ('HTTP status, no phrase', socks.HttpStatus(200, ''), b'HTTP/1.0 200\n'.hex()),
    ('HTTP status, empty phrase', socks.HttpStatus(403, ''), b'HTTP/1.1 403 \r\n'.hex()),
    ('ident', socks.IdentReply(b'stjohns'), b'6193, 23 : USERID : UNIX : stjohns\r\n'.hex()),
    ('ident, colons', socks.IdentReply(b'a:b : c'), b'1,2:USERID:UNIX,UTF-8:a:b : c\n'.hex()),
    ('ident, OTHER', socks.IdentReply(None), b'1, 2 : USERID : OTHER : a3f7\r\n'.hex()),
    ('ident, error', socks.IdentReply(None), b'6195, 23 : ERROR : NO-USER\r\n'.hex()),
    ('ident, empty', socks.IdentReply(None), b'\r\n'.hex()),
]

# What is only sent, so that nothing here reads it.
SENT = [
    ('HTTP', socks.HttpConnect(Address('example.org', 443)),
     b'CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n'),
    ('HTTP, IPv6', socks.HttpConnect(Address('2001:db8::1', 80)),
     b'CONNECT [2001:db8::1]:80 HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n'),
    ('HTTP, with credentials', socks.HttpConnect(Address('bücher.example', 80), b'bob:secret'),
     b'CONNECT xn--bcher-kva.example:80 HTTP/1.1\r\nHost: xn--bcher-kva.example:80\r\n'
     b'Proxy-Authorization: Basic Ym9iOnNlY3JldA==\r\n\r\n'),
    ('ident', socks.IdentQuery(6193, 23), b'6193 , 23\r\n'),
]

MALFORMED = [
    ('greeting of SOCKS4', Greeting, '0401', Reply.GENERAL_FAILURE),
    ('choice of SOCKS4', Choice, '005a', Reply.GENERAL_FAILURE),
    ('credentials, version 5', Credentials, '0503626f6206736563726574', Reply.GENERAL_FAILURE),
    ('verdict, version 4', Verdict, '0400', Reply.GENERAL_FAILURE),
    ('request, version 4', Request, '040100017f0000010050', Reply.GENERAL_FAILURE),
    ('request, address type 0', Request, '050100007f0000010050', Reply.ADDRESS_TYPE_NOT_SUPPORTED),
    ('request, address type 2', Request, '050100027f0000010050', Reply.ADDRESS_TYPE_NOT_SUPPORTED),
    ('response, address type 5', Response, '05000005', Reply.ADDRESS_TYPE_NOT_SUPPORTED),
    ('datagram in TCP, address type 2', StreamedDatagram, '00010a02',
     Reply.ADDRESS_TYPE_NOT_SUPPORTED),
    ('datagram in TCP, HDRLEN of all', StreamedDatagram, '00010b01', Reply.GENERAL_FAILURE),
    ('datagram in TCP, HDRLEN 0', StreamedDatagram, '00010001', Reply.GENERAL_FAILURE),
    ('datagram in TCP, HDRLEN of a name', StreamedDatagram, '0001090303', Reply.GENERAL_FAILURE),
    ('SOCKS4 request, version 5', Request4, '0501', Reply.GENERAL_FAILURE),
    ('SOCKS6, version 5', Request6, '0501', Reply.GENERAL_FAILURE),
    ('SOCKS6, version 207', Verdict6, 'cf00', Reply.GENERAL_FAILURE),
    ('SOCKS6 reply of SOCKS5', Response6, '0500', Reply.GENERAL_FAILURE),
    ('SOCKS6, address type 2', Request6, '0601 0000 0050 00 02 7f000001',
     Reply.ADDRESS_TYPE_NOT_SUPPORTED),
    ('SOCKS6, too many options', Request6, '0601 5004 0050 00 01 7f000001', Reply.GENERAL_FAILURE),
    ('SOCKS6, size of options', Request6, '0601 0006 0050 00 01 7f000001', Reply.GENERAL_FAILURE),
    ('SOCKS6, option of 0', Request6, '0601 0008 0050 00 01 7f000001 0009 0000',
     Reply.GENERAL_FAILURE),
    ('SOCKS6, option of 3', Request6, '0601 0008 0050 00 01 7f000001 0009 0003',
     Reply.GENERAL_FAILURE),
    ('SOCKS6, option of 6', Request6, '0601 0008 0050 00 01 7f000001 0009 0006',
     Reply.GENERAL_FAILURE),
    ('SOCKS6, option beyond', Request6, '0601 0008 0050 00 01 7f000001 0009 000c',
     Reply.GENERAL_FAILURE),
    ('SOCKS6 message of 11', Message6, '0603 000b 3132333435363738', Reply.GENERAL_FAILURE),
    ('SOCKS6, second option beyond', Verdict6, '0600 0008 0009 0004 0009 0008',
     Reply.GENERAL_FAILURE),
    ('SOCKS4 userid too long', Request4, '0401005001020304 61*513', Reply.GENERAL_FAILURE),
    ('SOCKS4a name too long', Request4, '040100500000000100 61*256', Reply.GENERAL_FAILURE),
    ('SOCKS4 reply of SOCKS5', Response4, '0500', Reply.GENERAL_FAILURE),
    ('HTTP status of two digits', socks.HttpStatus, b'HTTP/1.1 20 OK\n'.hex(),
     Reply.GENERAL_FAILURE),
    ('no HTTP status', socks.HttpStatus, b'SSH-2.0-x\r\n'.hex(), Reply.GENERAL_FAILURE),
    ('ident too long', socks.IdentReply, '31*1000', Reply.GENERAL_FAILURE),
]

DATAGRAMS = [
    ('IPv4', Datagram(Address('127.0.0.1', 18081), b'one'), '000000017f00000146a16f6e65'),
    ('IPv6', Datagram(Address('::1', 53), b'x'),
     '000000040000000000000000000000000000000100 3578'),
    ('name', Datagram(Address('localhost', 53), b'x'), '00000003096c6f63616c686f7374003578'),
    ('empty', Datagram(Address('1.2.3.4', 53), b''), '00000001010203040035'),
    ('first fragment', Datagram(Address('1.2.3.4', 53), b'AB', 1), '000001010102030400354142'),
    ('last fragment', Datagram(Address('1.2.3.4', 53), b'CD', 0x82), '000082010102030400354344'),
]

# What cannot be sent, and the word that tells what is wrong.
UNSENDABLE = [
    (Address('', 80), 'name of 0 bytes'),
    (Address('a' * 256, 80), 'name of 256 bytes'),
    (Address('\udcff', 80), 'idna|character|label'),
    (Credentials(b'u' * 256, b''), 'username of 256 bytes'),
    (Credentials(b'', b'p' * 256), 'password of 256 bytes'),
    (Request4(1, Address('::1', 80)), 'IPv6'),
    (StreamedDatagram(Datagram(Address('a' * 249, 80), b'').pack()), 'header of 256 bytes'),
    (StreamedDatagram(Datagram(Address('1.2.3.4', 80), bytes(65536)).pack()), 'of 65536 bytes'),
]


def trickle(data):
    """A read function that has one byte at a time, as the worst of networks."""
    stream = io.BytesIO(data)

    def read(n):
        taken = b''.join(stream.read(1) for _ in range(n))
        if len(taken) < n:
            raise EOFError('end of test data')
        return taken
    return read


class WireTest(unittest.TestCase):

    def test_no_secret_in_repr(self):
        for message in (Credentials(b'hunter1', b'hunter2'), socks.HttpConnect(
                Address('example.org', 80), b'hunter1:hunter2')):
            for text in repr(message), str(message), '%s %r' % (message, [message]):
                self.assertNotIn('hunter', text)

    def test_messages(self):
        for name, message, data in MESSAGES:
            data = hexed(data)
            with self.subTest(name):
                self.assertEqual(message.pack(), data)
                self.check_unpack(message, data)

    @unittest.skipUnless(sys.implementation.name == 'cpython', 'it has another collector')
    def test_garbage(self):
        """Parsing leaves nothing to the garbage collector, which would take longer than that."""
        self.addCleanup(gc.enable)
        gc.disable()
        gc.collect()
        for _ in range(100):
            Request.unpack(socks.reader(hexed('05 01 00 01 7f000001 0050'))[0])
        self.assertLess(gc.collect(), 100)

    def test_lenient(self):
        for name, message, data in LENIENT:
            with self.subTest(name):
                self.check_unpack(message, hexed(data))

    def test_what_is_only_sent(self):
        for name, message, data in SENT:
            with self.subTest(name):
                self.assertEqual(message.pack(), data)

    def check_unpack(self, message, data):
        """Whole with something behind it, byte by byte, and cut off at every byte."""
        read, rest = socks.reader(data + b'behind')
        self.assertEqual(type(message).unpack(read), message)
        self.assertEqual(rest(), b'behind')
        self.assertEqual(type(message).unpack(trickle(data)), message)
        lengths = range(len(data))
        for length in lengths if len(data) < 1000 else {*lengths[:300], *lengths[-300:]}:
            with self.assertRaises(EOFError):
                type(message).unpack(socks.reader(data[:length])[0])

    def test_malformed(self):
        for name, kind, data, reply in MALFORMED:
            with self.subTest(name), self.assertRaises(ProtocolError) as caught:
                kind.unpack(socks.reader(hexed(data) + b'\0' * 300)[0])
            self.assertEqual(caught.exception.reply, reply, name)

    def test_datagrams(self):
        for name, datagram, data in DATAGRAMS:
            data = hexed(data)
            header = len(data) - len(datagram.payload)
            with self.subTest(name):
                self.assertEqual(datagram.pack(), data)
                self.assertEqual(Datagram.unpack(data), datagram)
            for length in range(header):
                with self.subTest(name, length=length), self.assertRaises(EOFError):
                    Datagram.unpack(data[:length])

    def test_unsendable(self):
        for message, word in UNSENDABLE:
            with self.subTest(message), self.assertRaisesRegex(ValueError, word):
                message.pack()

    def test_names_are_sent_in_ascii(self):
        self.assertEqual(Address('bücher.example', 80).pack(),
                         b'\x03\x15xn--bcher-kva.example\0\x50')

    def test_response4_has_no_ipv6(self):
        self.assertEqual(Response4.of(Reply.SUCCEEDED, Address('::1', 80)).pack(),
                         hexed('005a005000000000'))


# HTTP: the head of a request, and what the target is sent of it, or the code that it is refused
# with.  Each is one text, `\n` stands for CR LF; the fields end with an empty line.
FORWARDED = [
    ('origin-form', 'GET http://h/a?b HTTP/1.1\nHost: h\n', 'GET /a?b HTTP/1.1\nHost: h\n@'),
    ('Host from the URL', 'GET http://h:81/ HTTP/1.1\nHost: other\n',
     'GET / HTTP/1.1\nHost: h:81\n@'),
    ('no Host', 'GET http://h/ HTTP/1.0\n', 'GET / HTTP/1.0\nHost: h\n@'),
    ('no path', 'GET http://h HTTP/1.1\n', 'GET / HTTP/1.1\nHost: h\n@'),
    ('query without path', 'GET http://h?q=/ HTTP/1.1\n', 'GET /?q=/ HTTP/1.1\nHost: h\n@'),
    ('fragment', 'GET http://h/a#b HTTP/1.1\n', 'GET /a HTTP/1.1\nHost: h\n@'),
    ('two slashes', 'GET http://h//x HTTP/1.1\n', 'GET //x HTTP/1.1\nHost: h\n@'),
    ('URL in a path', 'GET http://h/http://i/ HTTP/1.1\n', 'GET /http://i/ HTTP/1.1\nHost: h\n@'),
    ('IPv6', 'GET http://[::1]:8080/ HTTP/1.1\n', 'GET / HTTP/1.1\nHost: [::1]:8080\n@'),
    ('IPv6, usual port', 'GET http://[::1] HTTP/1.1\n', 'GET / HTTP/1.1\nHost: [::1]\n@'),
    ('empty port', 'GET http://h:/ HTTP/1.1\n', 'GET / HTTP/1.1\nHost: h\n@'),
    ('port 80', 'GET http://h:00080/ HTTP/1.1\n', 'GET / HTTP/1.1\nHost: h\n@'),
    ('upper case', 'GET HTTP://H/ HTTP/1.1\n', 'GET / HTTP/1.1\nHost: H\n@'),
    ('user in the URL', 'GET http://bob:s@x@h/ HTTP/1.1\n', 'GET / HTTP/1.1\nHost: h\n@'),
    ('OPTIONS of all', 'OPTIONS http://h:1 HTTP/1.1\n', 'OPTIONS * HTTP/1.1\nHost: h:1\n@'),
    ('OPTIONS of /', 'OPTIONS http://h/ HTTP/1.1\n', 'OPTIONS / HTTP/1.1\nHost: h\n@'),
    ('OPTIONS with a query', 'OPTIONS http://h?q HTTP/1.1\n', 'OPTIONS /?q HTTP/1.1\nHost: h\n@'),
    ('one hop less', 'TRACE http://h/ HTTP/1.1\nMax-Forwards: 2\n',
     'TRACE / HTTP/1.1\nHost: h\nMax-Forwards: 1\n@'),
    ('a method of others', 'PROPFIND http://h/ HTTP/1.1\n', 'PROPFIND / HTTP/1.1\nHost: h\n@'),
    ('hop by hop',
     'GET http://h/ HTTP/1.1\nProxy-Connection: keep-alive\nKeep-Alive: 5\nTE: trailers'
     '\nProxy-Authorization: Basic Ym9iOnM=\nA: 1\nConnection: a, X\nx: 2\nY: 3\nconnection: y,,\n'
     'B: 4\n', 'GET / HTTP/1.1\nHost: h\nB: 4\n@'),
    ('what frames stays', 'POST http://h/ HTTP/1.1\nContent-Length: 3\n'
     'Connection: content-length, host, transfer-encoding\n',
     'POST / HTTP/1.1\nHost: h\nContent-Length: 3\n@'),
    ('chunked', 'POST http://h/ HTTP/1.1\nTransfer-Encoding: gzip\nTransfer-Encoding:\tCHUNKED\n',
     'POST / HTTP/1.1\nHost: h\nTransfer-Encoding: gzip\nTransfer-Encoding: CHUNKED\n@'),
    ('white space', 'GET http://h/ HTTP/1.1\nA:1\nB: \t 2 \t\nC:\n',
     'GET / HTTP/1.1\nHost: h\nA: 1\nB: 2\nC: \n@'),
    ('what is expected, and who it came by',
     'PUT http://h/ HTTP/1.1\nExpect: 100-continue\nVia: 1.0 x\n'
     'Content-Length: 1\n',
     'PUT / HTTP/1.1\nHost: h\nExpect: 100-continue\nVia: 1.0 x\nContent-Length: 1\n@'),
    ('WebSocket', 'GET http://h/ HTTP/1.1\nConnection: keep-alive, Upgrade\nUpgrade: websocket\n',
     'GET / HTTP/1.1\nHost: h\nVia: 1.1 socks.py\nConnection: Upgrade\nUpgrade: websocket\n'),
    ('Upgrade unnamed', 'GET http://h/ HTTP/1.1\nUpgrade: websocket\n',
     'GET / HTTP/1.1\nHost: h\n@'),
    ('Upgrade of HTTP/1.0', 'GET http://h/ HTTP/1.0\nConnection: Upgrade\nUpgrade: websocket\n',
     'GET / HTTP/1.0\nHost: h\n@'),
    ('HTTP/2 within', 'GET http://h/ HTTP/1.1\nConnection: Upgrade, HTTP2-Settings\nUpgrade: h2c\n'
     'HTTP2-Settings: AAMAAABk\n', 'GET / HTTP/1.1\nHost: h\n@'),
]
REFUSED = [
    ('origin-form', 'GET / HTTP/1.1\nHost: h\n', 400),
    ('asterisk', 'OPTIONS * HTTP/1.1\nHost: h\n', 400),
    ('authority', 'GET h:80 HTTP/1.1\nHost: h\n', 400),
    ('no authority', 'GET http:/// HTTP/1.1\n', 400),
    ('no slashes', 'GET http:h HTTP/1.1\n', 400),
    ('https', 'GET https://h/ HTTP/1.1\n', 501), ('ftp', 'GET ftp://h/ HTTP/1.1\n', 501),
    ('port 0', 'GET http://h:0/ HTTP/1.1\n', 400), ('port', 'GET http://h:65536/ HTTP/1.1\n', 400),
    ('long port', 'GET http://h:000080/ HTTP/1.1\n', 400),
    ('no number', 'GET http://h:+80/ HTTP/1.1\n', 400), ('signed', 'CONNECT h:-1 HTTP/1.1\n', 400),
    ('CONNECT, no port', 'CONNECT h HTTP/1.1\n', 400),
    ('CONNECT, port 0', 'CONNECT h:0 HTTP/1.1\n', 400),
    ('CONNECT, empty port', 'CONNECT h: HTTP/1.1\n', 400),
    ('no host', 'CONNECT :80 HTTP/1.1\n', 400),
    ('CONNECT, user', 'CONNECT bob:s@h:80 HTTP/1.1\n', 400),
    ('CONNECT, URL', 'CONNECT http://h:80/ HTTP/1.1\n', 400),
    ('IPv6, no brackets', 'CONNECT ::1:80 HTTP/1.1\n', 400),
    ('IPv4 in brackets', 'CONNECT [127.0.0.1]:80 HTTP/1.1\n', 400),
    ('scope', 'CONNECT [fe80::1%lo]:80 HTTP/1.1\n', 400),
    ('long name', f'CONNECT {"a" * 256}:80 HTTP/1.1\n', 400),
    ('no such name in IDNA', f'CONNECT {"ü" * 100}:80 HTTP/1.1\n', 400),
    ('CONNECT, length', 'CONNECT h:80 HTTP/1.1\nContent-Length: 5\n', 400),
    ('CONNECT, chunked', 'CONNECT h:80 HTTP/1.1\nTransfer-Encoding: chunked\n', 400),
    ('two Hosts', 'GET http://h/ HTTP/1.1\nHost: h\nHost: h\n', 400),
    ('both lengths', 'POST http://h/ HTTP/1.1\nContent-Length: 3\nTransfer-Encoding: chunked\n',
     400),
    ('two lengths', 'POST http://h/ HTTP/1.1\nContent-Length: 3\nContent-Length: 4\n', 400),
    ('a list of lengths', 'POST http://h/ HTTP/1.1\nContent-Length: 3, 4\n', 400),
    ('length +3', 'POST http://h/ HTTP/1.1\nContent-Length: +3\n', 400),
    ('length 0x3', 'POST http://h/ HTTP/1.1\nContent-Length: 0x3\n', 400),
    ('no length', 'POST http://h/ HTTP/1.1\nContent-Length: \n', 400),
    ('³', 'POST http://h/ HTTP/1.1\nContent-Length: ³\n', 400),
    ('endless', f'POST http://h/ HTTP/1.1\nContent-Length: {"9" * 19}\n', 400),
    ('chunked not last', 'POST http://h/ HTTP/1.1\nTransfer-Encoding: chunked, gzip\n', 400),
    ('chunked twice', 'POST http://h/ HTTP/1.1\nTransfer-Encoding: chunked, chunked\n', 400),
    ('other coding', 'POST http://h/ HTTP/1.1\nTransfer-Encoding: xchunked\n', 400),
    ('identity', 'POST http://h/ HTTP/1.1\nTransfer-Encoding: identity\n', 400),
    ('no coding', 'POST http://h/ HTTP/1.1\nTransfer-Encoding:\n', 400),
    ('chunked with a parameter', 'POST http://h/ HTTP/1.1\nTransfer-Encoding: chunked;a\n', 400),
    ('chunked in HTTP/1.0', 'POST http://h/ HTTP/1.0\nTransfer-Encoding: chunked\n', 400),
    ('obs-fold', 'GET http://h/ HTTP/1.1\nA: 1\n B: 2\n', 400),
    ('obs-fold first', 'GET http://h/ HTTP/1.1\n Host: h\n', 400),
    ('space before colon', 'POST http://h/ HTTP/1.1\nContent-Length : 3\n', 400),
    ('tab before colon', 'POST http://h/ HTTP/1.1\nContent-Length\t: 3\n', 400),
    ('no colon', 'GET http://h/ HTTP/1.1\nHost\n', 400),
    ('no name', 'GET http://h/ HTTP/1.1\n: x\n', 400),
    ('NUL in a value', 'GET http://h/ HTTP/1.1\nA: b\0c\n', 400),
    ('NUL in a name', 'GET http://h/ HTTP/1.1\nA\0: b\n', 400),
    ('bare CR', 'GET http://h/ HTTP/1.1\nA: b\rB: c\n', 400),
    ('CR twice', 'GET http://h/ HTTP/1.1\nA: b\r\n', 400),
    ('no ASCII in a name', 'GET http://h/ HTTP/1.1\nÄ: b\n', 400),
    ('NUL in the URL', 'GET http://h/\0 HTTP/1.1\n', 400), ('no URL', 'GET HTTP/1.1\n', 400),
    ('two spaces', 'GET  http://h/ HTTP/1.1\n', 400),
    ('a space in it', 'GET http://h/ x HTTP/1.1\n', 400),
    ('a tab', 'GET\thttp://h/ HTTP/1.1\n', 400), ('version', 'GET http://h/ HTTP/1.1x\n', 400),
    ('another version', 'GET http://h/ HTTP/1.10\n', 400), ('HTTP/2.0', 'PRI * HTTP/2.0\n', 505),
    ('HTTP/0.9', 'GET http://h/ HTTP/0.9\n', 505), ('lower case', 'get http://h/ HTTP/1.1\n', 501),
    ('no method', 'G{T http://h/ HTTP/1.1\n', 501),
    ('long', 'A' * 33 + ' http://h/ HTTP/1.1\n', 501),
    ('TRACE of us', 'TRACE http://h/ HTTP/1.1\nMax-Forwards: 0\n', 501),
    ('OPTIONS of us', 'OPTIONS http://h/ HTTP/1.1\nMax-Forwards: 00\n', 501),
    ('many fields', 'GET http://h/ HTTP/1.1\n' + 'a: b\n' * 201, 431),
    ('a long list', 'GET http://h/ HTTP/1.1\nConnection: ' + 'a,' * 1000 + '\n', 431),
]
# Length of the body, None for a chunked one; the body; what must not be taken for a part of it.
BODIES = [
    (0, '', 'GET'), (5, 'hello', 'GET'), (5, 'hello', ''),
    (None, '0\n\n', 'GET'), (None, '5\nhello\n0\n\n', 'GET'),
    (None, '00005;a="b" \nhello\n000\n\n', '\n'),
    (None, 'A\n0123456789\na ;x\n0123456789\n0\n\n', '0\n\n'),
    (None, '2\n\n\n0\nTrailer: 1\nB: 2\n\n', 'C: 3\n\n'),
]
# Chunks of which others may see another end.
WRONG_CHUNKS = ['x', '\n', '0x5\nhello', '+5\nhello', '5 5\nhello', ';a\n', '-1\n', '1_0\n',
                '5\nhello0\n\n',
                '5\nhellox\n', '5\r\r\n', '5;a\rb\n', '5;a\0\n', '1' + '0' * 15 + '\n', '0\nA\n',
                '0\n A: b\n',
                '0\nA : b\n', '0\nA: b\rc\n', '5;' + 'a' * 5000, '0\nA: ' + 'a' * 5000]


class HttpWireTest(unittest.TestCase):

    def test_forwarded(self):
        for name, text, expected in FORWARDED:
            expected = expected.replace('@', 'Via: 1.%s socks.py\nConnection: close\n'
                                        % expected.partition(' HTTP/1.')[2][:1])
            with self.subTest(name):
                request = socks.HttpRequest.unpack(http_bytes(text + '\n'))
                self.assertEqual(request.forwarded().pack(), http_bytes(expected + '\n'))
                self.assertNotIn('Ym9i', repr(request))

    def test_refused(self):
        for name, text, code in REFUSED:
            with self.subTest(name), self.assertRaises(ProtocolError) as caught:
                socks.HttpRequest.unpack(http_bytes(text + '\n')).forwarded()
            self.assertEqual(caught.exception.reply, code, name)
            self.assertLess(len(str(caught.exception)), 200)

    def test_errors_tell_no_secret(self):
        for head in ('CONNECT bob:hush@h:80 HTTP/1.1\n', 'GET http://bob:hush@h:x/ HTTP/1.1\n',
                     'GET http://bob:hush@h/ x HTTP/1.1\n', 'GET http:bob:hush@h/ HTTP/1.1\n',
                     'GET https://bob:hush@h/ HTTP/1.1\n', 'GET http://bob:hush@/ HTTP/1.1\n',
                     'GET http://h/ HTTP/1.1\nProxy-Authorization : Basic hush\n',
                     'GET http://h/ HTTP/1.1\nProxy-Authorization: Basic\n hush\n'):
            with self.subTest(head), self.assertRaises(ProtocolError) as caught:
                socks.HttpRequest.unpack(http_bytes(head + '\n'))
            self.assertNotIn('hush', str(caught.exception))

    def test_what_others_may_take_for_an_end_or_space(self):
        for head in (b'GET http://h/ HTTP/1.1\n\n', b'GET http://h/ HTTP/1.1\nA: b\r\n\r\n',
                     b'GET http://h/ HTTP/1.1\r\nA: b\nB: c\r\n\r\n',
                     b'GET http://h/ HTTP/1.1\r\n\n',
                     b'GET http://h/ HTTP/1.1\r\nA: b\n\r\n',
                     b'PUT http://h/ HTTP/1.1\r\nTransfer-Encoding: chunked\xa0\r\n\r\n',
                     b'PUT http://h/ HTTP/1.1\r\nTransfer-Encoding: \x85chunked\r\n\r\n',
                     b'PUT http://h/ HTTP/1.1\r\nContent-Length: 3\xa0\r\n\r\n'):
            with self.subTest(head), self.assertRaises(ProtocolError) as caught:
                socks.HttpRequest.unpack(head)
            self.assertEqual(caught.exception.reply, 400)

    def test_connect(self):
        for text, expected in (
                ('CONNECT example.org:443 HTTP/1.1\nHost: example.org:443\n', ('example.org', 443)),
                ('CONNECT [::1]:1 HTTP/1.0\nContent-Length: 0\n', ('::1', 1)),
                ('CONNECT 127.1:65535 HTTP/1.1\nHost: x\n', ('127.1', 65535))):
            request = socks.HttpRequest.unpack(http_bytes(text + '\n'))
            self.assertEqual((request.command, request.address), (socks.Command.CONNECT, expected))
        address = Address('bücher.example', 80)
        head = socks.HttpConnect(address, b'bob:secret').pack()     # as our own client says it
        request = socks.HttpRequest.unpack(head)
        self.assertEqual((request.address, request.credentials),
                         (('xn--bcher-kva.example', 80), Credentials(b'bob', b'secret')))

    def test_credentials(self):
        for value, expected in (
                ('Basic Ym9iOnNlY3JldA==', (b'bob', b'secret')), ('basic  Ym9iOg', (b'bob', b'')),
                ('BASIC Ym9iOmE6Yg==', (b'bob', b'a:b')), ('Basic Og==', (b'', b'')),
                ('Basic 55So5oi3OuWvhueggQ==', ('用户'.encode(), '密码'.encode())),
                ('Basic Ym9i', None), ('Basic', None), ('Basic !', None),
                ('NTLM TlRMTVNTUAAB', None),
                ('Basic Ym9iOnNlY3JldA==\nProxy-Authorization: Basic Ym9iOnNlY3JldA==', None)):
            request = socks.HttpRequest.unpack(
                http_bytes(f'CONNECT h:80 HTTP/1.1\nProxy-Authorization: {value}\n\n'))
            self.assertEqual(request.credentials, expected, value)

    def test_answers(self):
        for answer, expected in (
                (socks.HttpAnswer(None), ''),
                (socks.HttpAnswer(socks.HttpCode.OK), 'HTTP/1.1 200 Connection established\n\n'),
                (socks.HttpAnswer(socks.HttpCode.FORBIDDEN, 'no'), 'HTTP/1.1 403 Forbidden\n@3\n'
                 'Connection: close\n\nno~'),
                (socks.HttpAnswer(socks.HttpCode.BAD_GATEWAY, 'no', False),
                 'HTTP/1.1 502 Bad Gateway\n@3\nConnection: close\n\n'),
                (socks.HttpAnswer(socks.HttpCode.LOGIN_REQUIRED),
                 'HTTP/1.1 407 Proxy Authentication '
                 'Required\n@1\nConnection: close\nProxy-Authenticate: Basic realm="socks.py", '
                 'charset="UTF-8"\n\n~')):
            fields = 'Content-Type: text/plain; charset=utf-8\nContent-Length: '
            self.assertEqual(answer.pack(),
                             http_bytes(expected.replace('@', fields)).replace(b'~', b'\n'))

    def test_heads_that_are_split(self):
        """Whole with something behind it, byte by byte, and cut off at every byte."""
        head = http_bytes('GET http://h/ HTTP/1.1\nHost: h\n\n')
        for step in (1, 2, 1000):
            with self.subTest(step):
                got, surplus = self.read_head(head + b'behind', step)
                self.assertEqual((got, b'behind'[:len(surplus)]), (head, surplus))
        for length in range(len(head)):
            with self.assertRaises(EOFError):
                self.read_head(head[:length], 1000)

    def read_head(self, data, step):
        """The head and the surplus, of data that comes in steps."""
        one, other = socket.socketpair()
        with one, other:
            one.setblocking(False)
            stream = socks.Stream(one, socks.deadline(PATIENCE))
            reading = stream.read_head()
            try:
                for piece in pieces(data, step):
                    next(reading)               # it waits for more
                    other.sendall(piece)
                next(reading)
                other.close()
                next(reading)
            except StopIteration as stop:
                return stop.value, stream.surplus

    def test_heads_too_large(self):
        for head in (b'GET http://h/' + b'a' * 65536,
                     b'GET http://h/ HTTP/1.1\r\nA: ' + b'a' * 65536,
                     b'GET http://h/ HTTP/1.1\r\nA: ' + b'a' * 65510 + b'\r\n\r\n'):
            with self.assertRaises(ProtocolError) as caught:
                self.read_head(head, 4096)
            self.assertEqual(caught.exception.reply, 431)
        for line in (b'GET /\r\n', b'SSH-2.0-x\r\n', b'HELO\n', b'GET / HTTP/1.1\n'):
            with self.assertRaises(ProtocolError) as caught:
                self.read_head(line, 1)         # at once: who says so may wait for an answer
            self.assertEqual(caught.exception.reply, 400)

    def test_bodies(self):
        for length, text, behind in BODIES:
            body, behind = http_bytes(text), http_bytes(behind)
            for step in (1, 2, 3, 1000):
                with self.subTest(text, step=step):
                    state = socks.HttpBody(length)
                    taken = sum(map(state.take, pieces(memoryview(body + behind), step)))
                    self.assertEqual(taken, len(body))

    def test_wrong_chunks(self):
        for text in WRONG_CHUNKS:
            data = http_bytes(text) + b'\n'
            for step in (1, 7, 10000)[len(data) > 1000:]:
                with self.subTest(text, step=step), self.assertRaises(ProtocolError):
                    self.take_all(data, step)

    def test_long_trailer(self):
        """As many fields as in a head, and no more."""
        fields = b'a: b\r\n' * socks.MAX_FIELDS
        self.take_all(b'0\r\n' + fields + b'\r\n', 1000)
        with self.assertRaisesRegex(ProtocolError, 'trailer of more than 200 fields'):
            self.take_all(b'0\r\n' + fields + b'a: b\r\n', 1000)

    def take_all(self, data, step):
        """Give all of the data to an `HttpBody`, in pieces."""
        state = socks.HttpBody(None)
        for piece in pieces(data, step):
            self.assertEqual(state.take(piece), len(piece))

    def test_costs(self):
        """Of heads that are as long as may be, in the ways that could make it slow."""
        room = socks.MAX_HEAD - 100
        for text in ('GET http://h/' + 'a' * room + ' HTTP/1.1\n',
                     'GET http://' + 'ü' * room + ' HTTP/1.1\n',
                     'GET http://' + 'a@' * (room // 2) + '/ HTTP/1.1\n',
                     'A' * room + ' x HTTP/1.1\n',
                     'GET ' + 'a:/' * (room // 3) + ' HTTP/1.1\n',
                     'GET http://h/ HTTP/1.1\nA:' + ' ' * room + 'b\n',
                     'GET http://h/ HTTP/1.1\nA:' + ' \tb' * (room // 3) + '\n',
                     'GET http://h/ HTTP/1.1\n' + 'a' * room + '\n',
                     'GET http://h/ HTTP/1.1\n' + 'a:\n' * (room // 4),
                     'GET http://h/ HTTP/1.1\nConnection:' + 'a,' * (room // 2) + '\n',
                     'GET http://h/ HTTP/1.1\nTransfer-Encoding:' + ',' * room + '\n',
                     'GET http://h/ HTTP/1.1\nContent-Length:' + '1' * room + '\n',
                     'CONNECT h:1 HTTP/1.1\nProxy-Authorization: Basic ' + '=' * room + '\n'):
            head = http_bytes(text + '\n')
            started = time.process_time()
            for _ in range(10):
                with contextlib.suppress(ProtocolError):
                    request = socks.HttpRequest.unpack(head)
                    request.credentials, request.forwarded().pack()
            self.assertLess(time.process_time() - started, 0.2, text[:40])

    def test_mutations(self):
        """Whatever comes, one request leaves, for the host of the URL, with one end; or none."""
        chance, accepted = random.Random(17), 0
        seeds = [http_bytes(text + '\n') for _, text, _ in FORWARDED]
        for _ in range(int(os.environ.get('MUTATIONS', 3000))):
            head = mutated(chance, chance.choice(seeds))
            end = socks.HttpHead.END.search(head)
            try:
                request = socks.HttpRequest.unpack(head[:end.end()] if end else head)
                sent = request.forwarded().pack() if request.method != 'CONNECT' else None
            except ProtocolError as error:
                self.assertIsInstance(error.reply, socks.HttpCode)
                continue
            accepted += 1
            if sent:
                self.check_sent(request, sent)
        self.assertGreater(accepted, 100)

    def check_sent(self, request, sent):
        """As the most careless of targets would read it."""
        lines = re.split(b'\r\n|\r|\n', sent)
        self.assertEqual((lines[-2:], lines.index(b'')), ([b'', b''], len(lines) - 2), sent)
        fields = [(name.strip().lower(), value.strip())
                  for name, _, value in (line.partition(b':') for line in lines[1:-2])]
        names = [name for name, _ in fields]
        self.assertEqual((names.count(b'host'), names.count(b'connection')), (1, 1), sent)
        self.assertLessEqual(names.count(b'content-length') + (b'transfer-encoding' in names), 1,
                             sent)
        self.assertNotIn(b'proxy-authorization', names)
        host = dict(fields)[b'host'].decode()
        self.assertIn(request.address.host.encode('idna').decode(), host)
        self.assertEqual(len(lines[0].split()), 3, sent)
        if b'content-length' in names:
            self.assertEqual(int(dict(fields)[b'content-length']), request.length)
        self.assertEqual(b'transfer-encoding' in names, request.length is None)


def http_bytes(text):
    """The bytes of a text in which `\\n` stands for CR LF."""
    return text.replace('\n', '\r\n').encode()


def mutated(chance, head):
    """A head with some bytes changed, lost, put in or doubled."""
    head = bytearray(head)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(head))
        other = chance.choice([b'\r', b'\n', b'\r\n', b' ', b'\t', b'\0', b':', b',', b'/', b'@',
                               b'#',
                               b'chunked', b'\r\nTransfer-Encoding: chunked',
                               b'\r\nContent-Length: 7',
                               b'\r\nHost: evil', b'\r\n\r\nGET http://evil/ HTTP/1.1\r\n\r\n',
                               b'\x0b', b'\x85', b'\xa0', b'\xff', bytes([chance.randrange(256)])])
        kind = chance.randrange(4)
        if kind == 0:
            head[place:place + 1] = other
        elif kind == 1:
            del head[place:place + chance.randrange(1, 9)]
        elif kind == 2:
            head[place:place] = other
        else:
            start = chance.randrange(place + 1)
            head[place:place] = head[start:place]
    return bytes(head)


# ------------------------------------------------------------------------------ sockets and access

CANONICAL = [
    ('127.0.0.1', '127.0.0.1'),
    ('::1', '::1'),
    ('0:0::0:1', '::1'),
    ('[2001:DB8::1]', '2001:db8::1'),
    ('::ffff:1.2.3.4', '1.2.3.4'),
    ('::ffff:102:304', '1.2.3.4'),
    ('Example.ORG', 'example.org'),
    ('localhost.', 'localhost'),
    ('bücher.example', 'xn--bcher-kva.example'),
    ('0', '0.0.0.0'), ('127.1', '127.0.0.1'), ('0x7F.1', '127.0.0.1'), ('127.1.', '127.0.0.1'),
    ('127.0.0.0xa', '127.0.0.10'), ('127.0.0.1.0xa', '127.0.0.1.0xa'), ('a.3com', 'a.3com'),
    ('a_b-c.d', 'a_b-c.d'), ('a' * 63 + '.b', 'a' * 63 + '.b'),
    ('a.' * 126 + 'b.', 'a.' * 126 + 'b'),
    ('b\u00dcCHER\u3002example\uff0e', 'xn--bcher-kva.example'), ('bu\u0308cher', 'xn--bcher-kva'),
    ('ΟΔΟΣ.example', 'xn--pxavbq.example'), ('日本.example', 'xn--wgv71a.example'),
]
NO_NAMES = ['', '.', 'a..', 'a..b', '.a', '127.0.0.1..',
            'a\0b', 'a b', 'a\nb', 'a\x7f', 'fe80::1%lo', 'a:b', '[a:b]', '\udcff',
            'ü' * 99,
            # What some resolver or proxy takes for another name.
            'secret\\116.example.org', 'x.oni\\111n', '10.0.0.4/.example.org', 'a#.example.org',
            'a?.example.org', 'a@b.example', '*.example.org', 'a%2e.example', 'a;b', 'a\n', 'a!b',
            '[10.0.0.4]', '[[10.0.0.4]]', '[[::1]]', '[::1', '::1]', '[::1].', '[a.example]', '[]',
            'a' * 64, 'a' * 64 + '.b', 'a.' * 127 + 'b', 'a.' * 127 + 'b.',
            # IDNA 2003 and 2008 differ, or 2008 has no such name.
            'stra\u00dfe.example', 'STRA\u1e9eE.example', '\u03bf\u03c2.example',
            'a\u200db.example', 'a\u200cb.example', 'a\u00adb.example', '\u2603.example',
            'a\u2024b.example',
            '\u2488example', '\uff05.example', 'a\u2060.example']

LOCAL = ['127.0.0.1', '127.1.2.3', '0.0.0.0', '0.1.2.3', '169.254.169.254', '224.0.0.1',
         '255.255.255.255', '::', '::1', 'fe80::1', 'ff02::1', 'fd00:ec2::254', '::ffff:127.0.0.1',
         '::127.0.0.1', '64:ff9b::7f00:1', '2002:7f00:1::', '2002:a9fe:a9fe::1',
         '::ffff:0:127.0.0.1', '2001:db8::5efe:127.0.0.1', '2001:db8::200:5efe:169.254.1.1',
         '2001:0:7f00:1::', '2001:0:102:304::80ff:fffe', '64:ff9b:1::7f00:1',
         '64:ff9b:1:7f00:0:100::', '64:ff9b:1:7f:0:1::', '64:ff9b:1:0:7f:0:100:0',
         'fec0::1', 'fd20:ce::254', '100.100.100.200', '192.0.0.192', '168.63.129.16',
         '64:ff9b::6464:64c8']
NOT_LOCAL = ['10.0.0.1', '192.168.1.1', '1.2.3.4', '128.0.0.1', '2001:db8::1', 'fd00::1',
             '64:ff9b::102:304', '2002:102:304::1', '::ffff:1.2.3.4', '64:ff9b:1::102:304',
             '2001:db8::5efe:1.2.3.4', '2001:0:102:304::fefd:fcfb', '2001:db8::7f00:1',
             '100.100.100.201', '192.0.0.1', '168.63.129.17', 'fd20:ce::253']


class SocketsTest(Case):

    @unittest.skipIf(resource is None, 'there is no limit of open files')
    def test_look_up_without_descriptors(self):
        """It fails for that, and not because there were no such name."""
        script = ('import resource, socks, sys, time, encodings.idna\n'
                  'resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n'
                  'try: print(socks.look_up("nowhere.example", 1))\n'
                  'except OSError as error: print(error.errno)')
        done = subprocess.run([sys.executable, '-c', script], cwd=compiled(), timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.stdout.decode(), f'{errno.EMFILE}\n', done.stderr)

    def test_canonical(self):
        for host, expected in CANONICAL:
            with self.subTest(host):
                self.assertEqual(socks.canonical(Address(host, 80)), Address(expected, 80))

    def test_what_no_name_has(self):
        for host in NO_NAMES:
            with self.subTest(host), self.assertRaises(ProtocolError) as caught:
                socks.canonical(Address(host, 80))
            self.assertTrue(str(caught.exception).isprintable(), host)

    def test_costly_names(self):
        """Nobody stops a loop with names of many labels, or of letters that stand for many."""
        names = [('\ufdfa.' * 63)[:number] for number in range(26, 126)]
        started = time.process_time()
        for name in names:
            with self.assertRaises(ProtocolError):
                socks.canonical(Address(name, 80))
        self.assertLess((time.process_time() - started) / len(names), 0.002)

    def test_resolve(self):
        self.assertEqual(resolve(Address('1.2.3.4', 80)), [Address('1.2.3.4', 80)])
        self.assertIn(Address('127.0.0.1', 80), resolve(Address('localhost', 80)))
        self.assertEqual(resolve(Address('127.1', 80)), [Address('127.0.0.1', 80)])

    def test_resolve_as_absolute(self):
        """The final dot is kept for the look-up, and nobody asks for what is no name."""
        asked = self.names(lambda *_: ['192.0.2.1'])
        for host, looked_up in (('a.test.', 'a.test.'), ('A.test', 'a.test'), ('db.', 'db.'),
                                ('db\u3002', 'db.'), ('db', 'db')):
            self.assertEqual(resolve(Address(host, 80)), [Address('192.0.2.1', 80)])
            self.assertEqual(asked.pop()[0], looked_up)
        for host in ('a\\.test', '[db]', 'a/b.test'):
            with self.subTest(host), self.assertRaises(ProtocolError):
                resolve(Address(host, 80))
        self.assertEqual(asked, [])

    def test_a_name_with_thousands_of_addresses(self):
        """Few of both families count, and the list is not gone through for each of them."""
        many = ['10.%d.%d.1' % divmod(number, 250) for number in range(6000)]
        self.names(lambda *_: many + ['2001:db8::%x' % number for number in range(100)])
        found = resolve(Address('many.test', 80))
        self.assertEqual([address.host for address in found],
                         [host for number in range(8)
                          for host in (many[number], '2001:db8::%s' % (number or ''))])
        addresses = [Address(host, 1) for host in many * 5] + [Address('::1', 1)] * 30000
        started = time.thread_time() if hasattr(time, 'thread_time') else time.process_time()
        self.assertEqual(len(socks.interleave(addresses)), 60000)
        ended = time.thread_time() if hasattr(time, 'thread_time') else time.process_time()
        self.assertLess(ended - started, 5)

    def test_names_that_are_nobodys(self):
        for host in ('invalid', 'a.invalid', 'abc.onion'):
            with self.subTest(host), self.assertRaises(socket.gaierror) as caught:
                resolve(Address(host, 80))
            self.assertEqual(socks.reply_for(caught.exception), Reply.HOST_UNREACHABLE)

    def test_interleave(self):
        order = socks.interleave([Address(host, 1) for host in ('::1', '::2', '::3', '1.1.1.1')])
        self.assertEqual([a.host for a in order], ['::1', '1.1.1.1', '::2', '::3'])

    def test_a_busy_socket_does_not_outlast_the_deadline(self):
        one, other = [self.enter(sock) for sock in socket.socketpair()]
        other.send(b'x')
        self.assertEqual(socks.run(socks.wait_ready([one], (), socks.deadline(PATIENCE))), [one])
        with self.assertRaises(socket.timeout):
            socks.run(socks.wait_ready([one], (), time.monotonic() - 1))

    def test_dial_falls_through(self):
        """A refused address costs nothing, a silent one ATTEMPT_DELAY."""
        origin = self.origin()
        addresses = [Address('127.0.0.1', port)
                     for port in (self.refused_port(), self.silent_port(), origin.port)]
        started = time.monotonic()
        with dial(addresses, PATIENCE) as sock:
            self.assertEqual(sock.getpeername(), addresses[2])
            self.assertGreater(time.monotonic() - started, socks.ATTEMPT_DELAY * 0.9)

    def test_dial_reports_what_says_most(self):
        addresses = [Address('127.0.0.1', port)
                     for port in (self.refused_port(), self.silent_port())]
        with self.assertRaises(ConnectionRefusedError):
            dial(addresses, 0.3)

    def test_racers(self):
        """Without room for one more attempt, a race waits for those under way."""
        origin = Address('127.0.0.1', self.origin().port)
        silent = [Address('127.0.0.1', self.silent_port()) for _ in range(2)]
        refused = Address('127.0.0.1', self.refused_port())
        self.change(socks, ATTEMPT_DELAY=0.01)
        for racers, share, owner, waiting, connects in (
                (64, 16, 'a', silent, True), (64, 0, 'a', silent, False),
                (64, 0, None, silent, True), (64, 1, 'a', silent, False),
                (0, 16, 'a', silent[:1], False), (0, 16, 'a', [refused], True)):
            self.change(socks.Race, RACERS=racers, SHARE=share)
            with self.subTest(racers=racers, share=share, owner=owner, waiting=waiting):
                until = socks.deadline(PATIENCE if connects else 0.1)
                dialling = socks.dial([*waiting, origin], until, owner=owner)
                try:
                    socks.run(dialling).close()
                    has_connected = True
                except socket.timeout:
                    has_connected = False
                self.assertEqual((has_connected, socks.Race.racers), (connects, {}))

    def test_dial_source(self):
        origin = self.origin()
        target = [Address('127.0.0.1', origin.port)]
        with dial(target, PATIENCE, ('127.0.0.2',)) as sock:
            self.assertEqual(sock.getsockname()[0], '127.0.0.2')
        with self.assertRaisesRegex(OSError, 'no source address for IPv') as caught:
            dial(target, PATIENCE, ('::1',))
        self.assertEqual(socks.reply_for(caught.exception), Reply.NETWORK_UNREACHABLE)

    def test_is_local(self):
        self.assertEqual([host for host in LOCAL if not socks.is_local(host)], [])
        self.assertEqual([host for host in NOT_LOCAL if socks.is_local(host)], [])

    def test_shown(self):
        for text, expected in [('bob', 'bob'), ('用户', r"'\u7528\u6237'"), ('', "''"),
                               ('a b', "'a b'"), ('\u3164', r"'\u3164'"),
                               ('a\nb', r"'a\nb'"), ('\x1b[2J', r"'\x1b[2J'"),
                               ('\udcff', r"'\udcff'")]:
            self.assertEqual(socks.printable(text), expected)

    def test_authenticated(self):
        users = socks.Users({b'bob': b'secret', 'eve': ''})
        for name, password, expected in [
                (b'bob', b'secret', True), (b'bob', b'secre', False), (b'bob', b'', False),
                (b'', b'', False), (b'eve', b'', True), (b'carl', b'', False),
                (b'carl', b'secret', False)]:
            with self.subTest(name=name, password=password):
                given = Credentials(name, password)
                self.assertEqual(socks.run(users.verify(given)), expected)


# ----------------------------------------------------------------------------------- conversation

# (name, what the client sends, what the server answers, whether it closes then).  Each part between
# slashes is sent, and answered, before the next; an empty answer is one that must not come yet.
# {port} is a target's, on 127.0.0.1 and ::1; {refused} and {silent} are what their names say.
GET = '474554202f20485454502f312e300d0a0d0a'
PAGE = '485454502f312e~'
NO_AUTHENTICATION = [
    ('S4-01', '0401{port}7f00000100 / ' + GET, '005a............ / ' + PAGE, False),
    ('S4-02 userid', '0401{port}7f000001626f6200', '005a............', False),
    ('S4-03 refused', '0401{refused}7f00000100', '005b............', True),
    ('S4-04 4a', '0401{port}00000001006c6f63616c686f737400', '005a............', False),
    ('S4-05 4a, x=ff', '0401{port}000000ff626f62006c6f63616c686f737400', '005a............', False),
    ('S4-06 4a, IPv4 text', '0401{port}00000001003132372e302e302e3100', '005a............', False),
    ('S4-07 4a, IPv6 text', '0401{port}00000001003a3a3100', '005a............', False),
    ('S4-08 4a, no such name', '0401{port}00000001006e6f2e737563682e696e76616c696400',
     '005b............', True),
    ('S4-09 4a, empty name', '0401{port}000000010000', '005b............', True),
    ('S4-10 0.0.0.0', '0401{port}0000000000', '005b............', True),
    ('S4-11 port 0', '040100007f00000100', '005b............', True),
    ('S4-12 unknown command', '0403{port}7f00000100', '005b............', True),
    ('S4-13 pipelined', '0401{port}7f00000100' + GET, '005a............' + PAGE, False),
    ('S4-14 split', '04 / 01{port2} / 7f / 000001 / 00', ' /  /  /  / 005a............', False),
    ('S4-15 long userid', '0401{port}7f000001 61*300 00', '005a............', False),
    ('S4-16 endless userid', '0401{port}7f000001 61*70000', '005b............', True),
    ('S4-22 RESOLVE', '04f000000000000100312e322e332e3400', '005b............', True),
    ('N-01', '050100', '0500', False),
    ('N-02', '05020001', '0500', False),
    ('N-03', '0503000102', '0500', False),
    ('N-04', '05020002', '0500', False),
    ('N-08 only passwords', '050102 / 0103626f6206736563726574', '0502 / 0100', False),
    ('N-09 GSSAPI', '050101', '05ff', True),
    ('N-10 no method', '0500', '05ff', True),
    ('N-11 ff offered', '0501ff', '05ff', True),
    ('N-12 private method', '050180', '05ff', True),
    ('N-13 duplicates', '0503000000', '0500', False),
    ('N-14 255 methods', '05ff' + bytes(range(255)).hex(), '0500', False),
    ('N-15 split', '05 / 03 / 00 / 01 / 02', ' /  /  /  / 0500', False),
    ('N-17 bad version', '00', '', True),
    ('N-18 bad version', '0301', '', True),
    ('N-19 HTTP', '47455420687474703a2f2f782f20485454502f312e310d0a0d0a',
     '485454502f312e3120353032~', True),
    ('N-20 TLS', '16030100a5', '', True),
    ('R-01', '050100 / 050100017f000001{port} / ' + GET,
     '0500 / 05000001............ / ' + PAGE, False),
    ('R-02 name', '050100 / 05010003096c6f63616c686f7374{port}',
     '0500 / 05000001............', False),
    ('R-03 IPv4 text', '050100 / 05010003093132372e302e302e31{port}',
     '0500 / 05000001............', False),
    ('R-04 IPv6 text', '050100 / 05010003033a3a31{port}', '0500 / 05000004~', False),
    ('R-05 IPv6 in brackets', '050100 / 05010003055b3a3a315d{port}', '0500 / 05000004~', False),
    ('R-06 final dot', '050100 / 050100030a6c6f63616c686f73742e{port}',
     '0500 / 05000001............', False),
    ('R-07 IPv6', '050100 / 0501000400000000000000000000000000000001{port}',
     '0500 / 0500000400000000000000000000000000000001....', False),
    ('R-08 v4-mapped', '050100 / 0501000400000000000000000000ffff7f000001{port}',
     '0500 / 050000017f000001....', False),
    ('R-09 refused', '050100 / 050100017f000001{refused}', '0500 / 05050001............', True),
    ('R-14 no such name', '050100 / 050100030f6e6f2e737563682e696e76616c6964{port}',
     '0500 / 05040001............', True),
    ('R-15 empty name', '050100 / 0501000300{port}', '0500 / 05010001............', True),
    ('R-16 long label', '050100 / 05010003ff 61*255 {port}', '0500 / 05!000001............', True),
    ('R-17 NUL in name', '050100 / 050100030a6c6f63616c686f737400{port}',
     '0500 / 05010001............', True),
    ('R-18 address type 2', '050100 / 050100027f000001{port}', '0500 / 05080001............', True),
    ('R-19 address type 0', '050100 / 050100007f000001{port}', '0500 / 05080001............', True),
    ('R-20 command 0', '050100 / 050000017f000001{port}', '0500 / 05070001............', True),
    ('R-21 command 4', '050100 / 050400017f000001{port}', '0500 / 05070001............', True),
    ('R-22 RESOLVE_PTR', '050100 / 05f100017f000001{port}', '0500 / 05070001............', True),
    ('R-23 RSV not 0', '050100 / 050101017f000001{port}', '0500 / 05000001............', False),
    ('R-24 version 4', '050100 / 040100017f000001{port}', '0500 / 05010001............', True),
    ('R-25 0.0.0.0', '050100 / 0501000100000000{port}', '0500 / 05010001............', True),
    ('R-25 ::', '050100 / 05010004 00*16 {port}', '0500 / 05010001............', True),
    ('R-25 "0"', '050100 / 050100030130{port}', '0500 / 05010001............', True),
    ('R-26 port 0', '050100 / 050100017f0000010000', '0500 / 05010001............', True),
    ('R-27 all at once', '050100050100017f000001{port}' + GET,
     '050005000001............' + PAGE, False),
    ('R-28 early data', '050100 / 050100017f000001{port}' + GET,
     '0500 / 05000001............' + PAGE, False),
    ('R-29 split', '05 / 01 / 00 / 05 / 0100 / 017f00 / 0001 / {port}',
     ' /  / 0500 /  /  /  /  / 05000001............', False),
    ('R-34 silence', '050100 / 050100017f000001{silent}', '0500 / 05060001............', True),
]
BOB = [
    ('S4-23 SOCKS4', '0401{port}7f00000100', '005b............', True),
    ('N-05', '0503000102', '0502', False),
    ('N-06', '050102', '0502', False),
    ('N-07', '050100', '05ff', True),
    ('P-01', '050102 / 0103626f6206736563726574 / 050100017f000001{port}',
     '0502 / 0100 / 05000001............', False),
    ('P-02 password', '050102 / 0103626f6206626164212121', '0502 / 01!00', True),
    ('P-03 user', '050102 / 010365766506736563726574', '0502 / 01!00', True),
    ('P-04 both empty', '050102 / 010000', '0502 / 01!00', True),
    ('P-05 empty password', '050102 / 0103626f6200', '0502 / 01!00', True),
    ('P-06 version 5', '050102 / 0503626f6206736563726574', '0502 / 01!00', True),
    ('P-07 UTF-8', '050102 / 0106e794a8e688b706e5af86e7a081', '0502 / 0100', False),
    ('P-08 all at once', '0501020103626f6206736563726574050100017f000001{port}' + GET,
     '0502010005000001............' + PAGE, False),
    ('P-09 longest', '050102 / 01ff 75*255 ff 70*255', '0502 / 01!00', True),
    ('P-10 split', '050102 / 01 / 03 / 626f / 62 / 06736563 / 726574',
     '0502 /  /  /  /  /  / 0100', False),
    ('P-11 credentials unasked', '050102 / 0103626f6206736563726574 / 0103626f6206736563726574',
     '0502 / 0100 / 05010001............', True),
    ('P-12 empty user', '050102 / 010006736563726574', '0502 / 01!00', True),
]
BOB_6 = '0004 0014 02 01 03 626f62 06 736563726574 000000'       # the option for bob
USERS = {b'bob': b'secret', '用户'.encode(): '密码'.encode()}


SIX = [
    ('6-01', '0601 0000 {port} 00 01 7f000001 / ' + GET,
     '0600 0000 0600 0000 .... 00 01 7f000001 / ' + PAGE, False),
    ('6-02 early data', '0601 0000 {port} 00 01 7f000001' + GET,
     '0600 0000 0600 0000 .... 00 01 7f000001' + PAGE, False),
    ('6-03 name', '0601 0000 {port} 00 03 0b 6c6f63616c686f7374 0000',
     '0600 0000 0600 0000 .... 00 01 7f000001', False),
    ('6-04 length without padding', '0601 0000 {port} 00 03 09 6c6f63616c686f7374 0000',
     '0600 0000 0600 0000 .... 00 01 7f000001', False),
    ('6-05 IPv6', '0601 0000 {port} 00 04 00*15 01',
     '0600 0000 0600 0000 .... 00 04' + '00' * 15 + '01',
     False),
    ('6-06 refused', '0601 0000 {refused} 00 01 7f000001',
     '0600 0000 0605 0000 0000 00 01 00000000',
     True),
    ('6-07 silence', '0601 0000 {silent} 00 01 7f000001', '0600 0000 0609 0000 0000 00 01 00000000',
     True),
    ('6-08 no such name', '0601 0000 {port} 00 03 0f 6e6f2e737563682e696e76616c6964',
     '0600 0000 0604 0000 0000 00 01 00000000', True),
    ('6-09 empty name', '0601 0000 {port} 00 03 00 000000',
     '0600 0000 0601 0000 0000 00 01 00000000',
     True),
    ('6-10 address type 2', '0601 0000 {port} 00 02 7f000001',
     '0600 0000 0608 0000 0000 00 01 00000000', True),
    ('6-11 command 4', '0604 0000 {port} 00 01 7f000001', '0600 0000 0607 0000 0000 00 01 00000000',
     True),
    ('6-12 NOOP', '0600 0000 0000 00 01 00000000', '0600 0000 0600 0000 0000 00 01 00000000', True),
    ('6-13 NOOP, IPv6', '0600 0000 0000 00 04 00*16',
     '0600 0000 0600 0000 0000 00 01 00000000', True),
    ('6-14 NOOP with a name', '0600 0000 0000 00 03 03 612e62',
     '0600 0000 0601 0000 0000 00 01 00000000', True),
    ('6-15 NOOP with a port', '0600 0000 {port} 00 01 00000000',
     '0600 0000 0601 0000 0000 00 01 00000000', True),
    ('6-16 port 0', '0601 0000 0000 00 01 7f000001',
     '0600 0000 0601 0000 0000 00 01 00000000', True),
    ('6-17 unknown options', '0601 000c {port} 00 01 7f000001 0005 0004 fc00 0008 01020304' + GET,
     '0600 0000 0600 0000 .... 00 01 7f000001' + PAGE, False),
    ('6-18 option of 0', '0601 0004 {port} 00 01 7f000001 0009 0000', '0601 0000', True),
    ('6-19 option of 3', '0601 0004 {port} 00 01 7f000001 0009 0003', '0601 0000', True),
    ('6-20 option beyond', '0601 0004 {port} 00 01 7f000001 0009 0008', '0601 0000', True),
    ('6-21 too many options', '0601 5004 {port} 00 01 7f000001', '0601 0000', True),
    ('6-23 first data unasked', '0601 0008 {port} 00 01 7f000001 0002 0008 0012 02 00' + GET,
     '0600 0000 0600 0000 .... 00 01 7f000001' + PAGE, False),
    ('6-24 too much first data', '0601 0008 {port} 00 01 7f000001 0002 0008 4001 02 00',
     '0601 0000', True),
    ('6-25 methods without data', '0601 0004 {port} 00 01 7f000001 0002 0004', '0601 0000', True),
    ('6-26 methods twice', '0601 0010 {port} 00 01 7f000001' + '0002 0008 0000 02 00' * 2,
     '0601 0000', True),
    ('6-27 credentials unasked', '0601 0014 {port} 00 01 7f000001 0004 0014 02'
     '01 03 626f62 06 736563726574 000000',
     '0600 0008 0004 0008 02 01 00 00 0600 0000 .... 00 01 7f000001', False),
    ('6-28 split', '06 / 01 / 0000 / {port} / 00 / 017f0000 / 01',
     ' /  /  /  /  /  / 0600 0000 0600 0000 .... 00 01 7f000001', False),
    ('6-29 CONNECT to the DNS of the proxy', '0601 0000 0035 00 01 00000000',
     '0600 0000 0605 0000 0000 00 01 00000000', True),
]
SIX_BOB = [
    ('6-40', '0601 0014 {port} 00 01 7f000001 0004 0014 02'
     '01 03 626f62 06 736563726574 000000' + GET,
     '0600 0008 0004 0008 02 01 00 00 0600 0000 .... 00 01 7f000001' + PAGE, False),
    ('6-41 wrong password', '0601 0014 {port} 00 01 7f000001 0004 0014 02'
     '01 03 626f62 06 626164212121 000000' + GET, '0601 0008 0004 0008 02 01 01 00', True),
    ('6-42 no credentials', '0601 0000 {port} 00 01 7f000001' + GET, '0601 0000', True),
    ('6-43 other method', '0601 0008 {port} 00 01 7f000001 0004 0008 01 00 00 00',
     '0601 0000', True),
    ('6-44 credentials twice', '0601 0028 {port} 00 01 7f000001'
     + '0004 0014 02 01 03 626f62 06 736563726574 000000' * 2, '0601 0000', True),
    ('6-45 credentials cut off', '0601 0010 {port} 00 01 7f000001'
     '0004 0010 02 01 03 626f62 06 7365637265', '0601 0000', True),
    ('6-46 padding not zero', '0601 0014 {port} 00 01 7f000001'
     '0004 0014 02 01 03 626f62 06 736563726574 000001', '0601 0000', True),
    ('6-47 padding too long', '0601 0018 {port} 00 01 7f000001'
     '0004 0018 02 01 03 626f62 06 736563726574 00000000000000', '0601 0000', True),
    ('6-48 credentials, version 5', '0601 0014 {port} 00 01 7f000001'
     '0004 0014 02 05 03 626f62 06 736563726574 000000', '0601 0000', True),
    ('6-49 option without data', '0601 0004 {port} 00 01 7f000001 0004 0004', '0601 0000', True),
    ('6-50 address type 2', '0601 0000 {port} 00 02 7f000001', '0601 0000', True),
    ('6-51 chosen method', '0601 0008 {port} 00 01 7f000001 0002 0008 0000 02 00'
     '/ 01 03 626f62 06 736563726574',
     '0601 0008 0003 0008 02 000000 / 0100 0600 0000 0600 0000 .... 00 01 7f000001', False),
    ('6-52 chosen method, first data', '0601 0008 {port} 00 01 7f000001 0002 0008 0012 02 00' + GET
     + '/ 01 03 626f62 06 736563726574',
     '0601 0008 0003 0008 02 000000 / 0100 0600 0000 0600 0000 .... 00 01 7f000001' + PAGE, False),
    ('6-53 chosen method, wrong password', '0601 0008 {port} 00 01 7f000001 0002 0008 0012 02 00'
     + GET + '/ 01 03 626f62 06 626164212121',
     '0601 0008 0003 0008 02 000000 / 0101 0601 0000', True),
    ('first data that does not come', '0601 0008 {port} 00 01 7f000001 0002 0008 4000 02 00'
     '/ 01 03 626f62 06 736563726574', '0601 0008 0003 0008 02 000000 / ', False),
    ('6-54 no acceptable method', '0601 0008 {port} 00 01 7f000001 0002 0008 0000 01 00',
     '0601 0008 0003 0008 ff 000000', True),
    ('6-55 NOOP', '0600 0014 0000 00 01 00000000 0004 0014 02 01 03 626f62 06 736563726574 000000',
     '0600 0008 0004 0008 02 01 00 00 0600 0000 0000 00 01 00000000', True),
    ('6-56 NOOP, chosen method', '0600 0008 0000 00 01 00000000 0002 0008 0100 02 00'
     '/ 01 03 626f62 06 736563726574',
     '0601 0008 0003 0008 02 000000 / 0100 0600 0000 0600 0000 0000 00 01 00000000', True),
]


class StreamTest(Case):

    def test_a_byte_at_a_time(self):
        """Each byte costs the same, however long the message is already."""
        for stream_class, start, unpack, length in (
                (socks.Stream, b'\4\1\0\x50\1\2\3\4', Request4.unpack, 500),
                (socks.Stream, b'P', socks.ProxyHeader.unpack, 100),
                (socks.Stream, hexed('0601 5000 0050 00 01 7f000001'), Request6.unpack, 2000),
                (socks.ExactStream, b'', socks.http_line, 2000),
                (socks.ExactStream, b'0 , 0 : ', socks.IdentReply.unpack, 900)):
            near, far = (self.enter(sock) for sock in socket.socketpair())
            near.setblocking(False)
            conversation = stream_class(near, None).read(unpack)
            next(conversation)
            calls = 0

            def count(frame, event, _):
                nonlocal calls
                calls += event in ('call', 'c_call')

            for byte in (start + b'x' * (length - len(start))):
                far.send(bytes((byte,)))
                sys.setprofile(count)
                conversation.send([near])
                sys.setprofile(None)
            with self.subTest(unpack.__qualname__):
                self.assertLess(calls, 50 * length)


class VectorCase(Case):
    """Every vector, in the parts it names and one byte at a time."""

    def setUp(self):
        super().setUp()
        origin = self.origin(echo)
        if HAS_IPV6:
            self.origin(echo, host='::1', port=origin.port)
        self.ports = {'port': origin.port, 'refused': self.refused_port(),
                      'silent': self.silent_port()}

    def check(self, vectors, server):
        for (name, sends, answers, closes), step in itertools.product(vectors, (None, 1)):
            if 'IPv6' in name and not HAS_IPV6:
                continue
            sends = sends.replace('{port2}', '{port}')
            with self.subTest(name, step=step), Peer(server.server_address) as peer:
                self.converse(peer, sends.split('/'), answers.split('/'), step)
                if closes:
                    self.check_end(peer, may_reset=not answers.strip())

    def converse(self, peer, sends, answers, step):
        self.assertEqual(len(sends), len(answers))
        for send, answer in zip(sends, answers):
            data = hexed(send, **self.ports)
            with contextlib.suppress(ConnectionError):  # an endless message is not read to its end
                peer.send(data[:1000] if step else data, step)
            expected = pattern(answer, **self.ports)
            length = len(re.findall(r'!00|\.\.|[0-9a-f]{2}', answer))
            self.assertRegex(peer.read(length), re.compile(expected, re.DOTALL))
            if answer.strip().endswith('~'):
                peer.sock.recv(65536)


class ConversationTest(VectorCase):

    def test_vectors(self):
        self.check(NO_AUTHENTICATION, self.serve(connect_timeout=0.3))

    def test_vectors_with_users(self):
        self.check(BOB, self.serve(users=USERS))

    def test_vectors_of_socks6(self):
        self.check(SIX, self.serve(socks6=True, connect_timeout=0.3))

    def test_vectors_of_socks6_with_users(self):
        self.check(SIX_BOB, self.serve(socks6=True, users=USERS, login_delay=0.02))

    def test_silence_ends_the_handshake(self):
        """N-16, N-21: one deadline for all of it, however slowly the client goes on."""
        server = self.serve(handshake_timeout=0.3)
        started = time.monotonic()
        peers = [(start, self.peer(server.server_address))
                 for start in ('', '0509 00', '050100', '050100050100')]
        for start, peer in peers:
            peer.send(hexed(start))
        for start, peer in peers:
            with self.subTest(start):
                self.assertEqual(peer.rest(), b'\5\0' if '050100' in start else b'')
                self.assertLess(time.monotonic() - started, 3)
        with Peer(server.server_address) as peer, self.assertRaises((OSError, EOFError)):
            for _ in range(200):
                peer.send(b'\5')                # 5 methods, the fifth of which never comes
                if ready([peer.sock], [], 0.02):
                    peer.read(1)

    def test_client_leaves(self):
        """S4-24, R-33: no answer to a request that ends early."""
        server = self.serve()
        for start, answer in (('040146', ''), ('050100 0501000103', '0500'), ('05', '')):
            with self.subTest(start), Peer(server.server_address) as peer:
                peer.send(hexed(start))
                peer.finish()
                self.assertEqual(peer.rest(), hexed(answer))
        eventually(lambda: len(self.lines) == 3)
        for line in self.lines:
            self.assertIn('no request: the client left', line)

    def test_probe_is_silent(self):
        server = self.serve()
        for end in (Peer.finish, Peer.reset):
            with Peer(server.server_address) as peer:
                end(peer)
        with Peer(server.server_address) as peer:
            peer.connect('127.0.0.1', self.ports['port'])
        eventually(lambda: self.lines)
        self.assertEqual(len(self.lines), 1)

    def test_refusal_survives_unread_input(self):
        """A close with unread input would send RST, and the reply might be lost."""
        server = self.serve()
        with Peer(server.server_address) as peer:
            peer.send(hexed('050101') + b'x' * 100000)
            self.assertEqual(peer.rest(), hexed('05ff'))

    def test_flood_after_refusal(self):
        """A client that goes on sending is cut off, and slows nobody meanwhile."""
        self.change(socks, LINGER=0.3)
        server = self.serve()
        flood = self.peer(server.server_address)
        flood.send(hexed('050101'))
        self.assertEqual(flood.read(2), hexed('05ff'))
        started = time.monotonic()
        with self.assertRaises(ConnectionError):
            while time.monotonic() < started + PATIENCE:
                flood.send(bytes(1 << 20))
                with Peer(server.server_address) as peer:
                    before = time.monotonic()
                    peer.ask(Greeting(b'\0'), Choice)
                    self.assertLess(time.monotonic() - before, 0.5)

    def test_hooks(self):
        """R-12, and the ways to decide more that Server's docstring names."""
        class Strict(socks.Server):
            def verify_request(self, request, client_address):
                return client_address[0] != '127.0.0.3'

            def authorize(self, client, target, name=None):
                super().authorize(client, target, name)
                if target.host == '3.3.3.3':
                    raise socks.Refused('not there')

        class Teapot(socks.Handler):
            def do_BIND(self, request):
                raise socks.Refused('a teapot', reply=Reply.TTL_EXPIRED)

        server = self.serve(Teapot, Strict)
        peer = self.peer(server.server_address)
        self.assertEqual(peer.connect('3.3.3.3', 80), Response(Reply.NOT_ALLOWED))
        peer = self.peer(server.server_address)
        self.assertEqual(peer.request(2, Address('1.1.1.1', 1)).reply,
                         Reply.TTL_EXPIRED)
        with self.assertRaises((OSError, EOFError)):
            self.peer(server.server_address, ('127.0.0.3', 0)).connect('127.0.0.1', 1)

    def test_ordinary_methods(self):
        """A do_COMMAND that is no conversation has a thread of its own and may block."""
        class Ordinary(socks.Handler):
            def do_CONNECT(self, request):
                host, port = request.address
                if host == 'refuse.test':
                    raise socks.Refused('not today', reply=Reply.TTL_EXPIRED)
                if host == 'close.test':
                    return None
                if host == 'memory.test':
                    near, far = socket.socketpair()
                    with far:
                        far.sendall(b'from memory')
                    return near
                if host == 'direct.test':
                    return socket.create_connection(('127.0.0.1', port))
                return super().do_CONNECT(request)

            do_BIND = None

        class Connectionless(socks.Handler):
            do_CONNECT = None

        origin = self.origin(echo)
        server = self.serve(Ordinary)
        for host, code, data in (('refuse.test', 6, b''), ('memory.test', 0, b'from memory'),
                                 ('direct.test', 0, b'hello'), ('127.0.0.1', 0, b'hello')):
            with self.subTest(host), Peer(server.server_address) as peer:
                self.assertEqual(peer.connect(host, origin.port).reply, code)
                if data == b'hello':
                    peer.send(HTTP)
                self.assertTrue(peer.rest().endswith(data))
        with Peer(server.server_address) as peer:
            peer.begin(1, Address('close.test', 80))
            self.assertEqual(peer.rest(), b'')
        with Peer(server.server_address) as peer:
            self.assertEqual(peer.request(2, Address('0.0.0.0', 0)).reply, 7)
        self.assertIn('refused: not today', self.lines[0])
        for handler, answer in (Ordinary, b'without an HTTP answer'), (Connectionless, b' 501 '):
            with self.subTest(handler), Peer(self.serve(handler).server_address) as peer:
                peer.send(b'GET http://memory.test/ HTTP/1.0\r\n\r\n')
                self.assertIn(answer, peer.rest())

    def test_client_leaves_an_ordinary_method(self):
        """What it returns then is closed."""
        go, made = threading.Event(), []
        self.addCleanup(go.set)

        class Slow(socks.Handler):
            def do_CONNECT(self, request):
                go.wait(PATIENCE)
                near, far = socket.socketpair()
                made.append(far)
                return near

        server = self.serve(Slow)
        with Peer(server.server_address) as peer:
            peer.begin(1, Address('127.0.0.1', 80))
            eventually(lambda: any(client.command for client in server.clients))
            peer.reset()
            eventually(lambda: not server.clients)
        go.set()
        with eventually(lambda: made)[0] as far:
            far.settimeout(PATIENCE)
            self.assertEqual(far.recv(1), b'')

    def test_recorded_sessions(self):
        """log_session() gets what was asked for, whatever the level of the log is."""
        lines = []

        class Recording(socks.Server):
            def log_session(self, line):
                lines.append(line)

        socks.log.setLevel(logging.WARNING)
        self.addCleanup(socks.log.setLevel, logging.INFO)
        server, origin = self.serve(server_class=Recording), self.origin(echo)
        with Peer(server.server_address) as peer:
            peer.connect('127.0.0.1', origin.port)
            peer.send(HTTP)
            peer.rest()
        line = eventually(lambda: lines)[0]
        self.assertEqual((line.protocol, line.command, line.target, line.outcome, line.up),
                         ('SOCKS5', 'CONNECT', f'127.0.0.1:{origin.port}', 'done', len(HTTP)))

    def test_other_handlers_of_socketserver(self):
        """They get the bare connections, in a thread each."""
        class Shout(socketserver.StreamRequestHandler):
            def handle(self):
                self.wfile.write(self.rfile.readline().upper())

        server = self.serve(Shout)
        with Peer(server.server_address) as peer:
            peer.send(b'hello\n')
            self.assertEqual(peer.rest(), b'HELLO\n')
        with self.assertRaisesRegex(NotImplementedError, 'serve_forever'):
            server.handle_request()

    def test_bound_address_is_the_real_one(self):
        """Of the connection to the target, so that it is what the target sees."""
        seen = []
        origin = self.origin(lambda peer: seen.append(peer.sock.getpeername()))
        response = self.peer(self.serve().server_address).connect('127.0.0.1', origin.port)
        self.assertEqual([response.address], eventually(lambda: seen))

    def test_source(self):
        origin = self.origin(lambda peer: peer.send(peer.sock.getpeername()[0].encode()))
        peer = self.peer(self.serve(source=('127.0.0.9',)).server_address)
        self.assertEqual(peer.connect('127.0.0.1', origin.port).address.host, '127.0.0.9')
        self.assertEqual(peer.rest(), b'127.0.0.9')
        peer = self.peer(self.serve(source=('127.0.0.9',)).server_address)
        self.assertEqual(peer.connect('::1', origin.port), Response(NO_IPV6_ROUTE))

    def test_localhost(self):
        """Whatever the system says that it is."""
        server = self.serve()
        self.addCleanup(setattr, socket, 'getaddrinfo', socket.getaddrinfo)
        for addresses in (('127.0.0.1',), ('127.0.0.1', '::1'), ('::1', '127.0.0.1'), ('::1',)):
            with self.subTest(addresses), Peer(server.server_address) as peer:
                possible(addresses[-1])
                socket.getaddrinfo = functools.partial(getaddrinfo, localhost=addresses)
                self.assertEqual(peer.connect('localhost', self.ports['port']).reply, 0)
                peer.send(b'x')
                self.assertEqual(peer.read(1), b'x')

    def test_log_line(self):
        server = self.serve(users=USERS)
        peer = self.peer(server.server_address)
        peer.ask(Greeting(b'\2'), Choice)
        peer.ask(Credentials(b'bob', b'secret'), Verdict)
        peer.ask(Request(1, Address('localhost', self.ports['port'])), Response)
        peer.send(b'12345')
        peer.read(5)
        peer.finish()
        peer.rest()
        self.assertRegex(self.line(), r'^127\.0\.0\.1:\d+ bob SOCKS5 CONNECT localhost:%d: done, '
                                       r'5 bytes up, 5 down, 0\.\d+ s$' % self.ports['port'])

    def test_names_in_the_log(self):
        """As rules see them."""
        server, origin = self.serve(), self.origin(echo)
        for host, name in (('LOCALHOST.', 'localhost'), ('::ffff:127.0.0.1', '127.0.0.1'),
                           ('a..b', 'a..b')):
            with Peer(server.server_address) as peer:
                peer.connect(host, origin.port)
            line = eventually(lambda: self.lines and self.lines.pop())
            self.assertIn(f' CONNECT {name}:{origin.port}: ', line)

    def test_log_cannot_be_forged(self):
        server = self.serve(users=USERS)
        for message in (hexed('050102') + Credentials(b'eve\nroot', b'hunter2').pack(),
                        hexed('0401{port}00000001', **self.ports) + b'\0a\nb\0'):
            with Peer(server.server_address) as peer:
                peer.send(message)
                peer.rest()
        eventually(lambda: len(self.lines) == 2)
        for line in self.lines:
            self.assertTrue(line.isprintable(), line)
            self.assertNotIn('hunter2', line)

    def test_log_is_ascii(self):
        """Beyond it there are letters that look like spaces."""
        server = self.serve()
        for name in '\u2800', '\u3164', 'a\u00a0done,', 'b\x1b[2J', '\udcff':
            with self.subTest(ascii(name)), Peer(server.server_address) as peer:
                name = name.encode('utf-8', 'surrogateescape')
                peer.send(hexed('050100 05010003') + bytes((len(name),)) + name + b'\0\1')
                peer.rest()
                line = eventually(lambda: self.lines and self.lines.pop())
                self.assertRegex(line, '^[ -~]+$')

    def test_user_of_a_failed_login(self):
        """It is a password that was typed in the wrong place, unless there is such a user."""
        server = self.serve(users=USERS)
        for user, expected in (b'hunter2', ' - SOCKS5 '), (b'bob', ' bob SOCKS5 '):
            with self.subTest(user), Peer(server.server_address) as peer:
                peer.ask(Greeting(b'\2'), Choice)
                self.assertEqual(peer.ask(Credentials(user, b'wrong'), Verdict).status, 1)
                self.assertIn(expected, eventually(lambda: self.lines and self.lines.pop()))

    def test_line_of_who_is_refused(self):
        """It is there before the client has ended the connection, and does not count that time."""
        server = self.serve()
        peer = self.peer(server.server_address)
        self.assertEqual(peer.connect('127.0.0.1', self.refused_port()).reply, 5)
        line = self.line()
        self.assertTrue(server.clients)
        self.assertRegex(line, r'failed: Connection refused, 0 bytes up, 0 down, 0\.\d+ s$')
        peer.finish()
        eventually(lambda: not server.clients)
        self.assertEqual(len(self.lines), 1)

    def test_steps(self):
        """-v: what was offered and chosen, found and tried, in words."""
        socks.log.setLevel(logging.DEBUG)
        self.addCleanup(socks.log.setLevel, logging.INFO)
        server, refused = self.serve(), self.refused_port()
        upstream = tuple(socks.parse_chain(f'socks5h://{server.server_address}'))
        for server in server, self.serve(upstream=upstream):
            lines = self.lines
            with Peer(server.server_address) as peer:
                peer.connect('localhost', refused)
                peer.finish()
                peer.rest()
        text = '\n'.join(lines)
        self.assertNotIn('Address(', text)
        for step in ('SOCKS5, methods offered: 00, chosen: 00, access without .*',
                     f'SOCKS5 CONNECT localhost:{refused}, user -', r'localhost is [0-9a-f.:, ]+',
                     rf'dialling \S+:{refused}', rf'\S+:{refused}: Connection refused'):
            self.assertRegex(text, rf'(?m)^127\.0\.0\.1:\d+: {step}$')
        self.assertIn(f': through {upstream[0]}', '\n'.join(self.lines))

    def test_methods_in_words(self):
        server = self.serve(users=USERS)
        with Peer(server.server_address) as peer:
            peer.send(hexed('05020001'))
            peer.rest()
        self.assertIn('refused: the client offered no password; methods offered: 0001, expected 02',
                      self.line())


# ------------------------------------------------------------------------------------------- relay

def pour(peer, size, seed):
    """Send `size` random bytes; returns their hash."""
    digest, source = hashlib.sha256(), random.Random(seed)
    block = random_bytes(source, 1 << 18)
    for start in range(0, size, len(block)):
        data = block[start % 251:][:size - start]
        digest.update(data)
        peer.send(data)
    peer.finish()
    return digest.hexdigest()


def drink(peer):
    """The hash of all that comes."""
    digest = hashlib.sha256()
    for data in iter(lambda: peer.sock.recv(1 << 18), b''):
        digest.update(data)
    return digest.hexdigest()


class Background(threading.Thread):
    """A function called in a thread; `with` waits for it, result() gives what it returned."""

    def __init__(self, function, *args):
        super().__init__()
        self.call = function, args
        self.error = None
        self.start()

    def run(self):
        function, args = self.call
        try:
            self.value = function(*args)
        except BaseException as error:
            self.error = error

    def result(self):
        """What the function returned, or raises what it raised."""
        self.join(60)
        if self.error:
            raise self.error
        return self.value

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.join(60)
        if not error:
            self.result()


class RelayTest(Case):

    def setUp(self):
        super().setUp()
        self.held = self.origin()

    def test_both_ways_at_once(self):
        """64 MiB each way, every byte intact."""
        self.exchange(*self.tunnel(self.serve(), self.held), 64 << 20)

    def test_half_close(self):
        """The end of one direction leaves the other as it is, whoever comes first."""
        server = self.serve()
        near, far = self.tunnel(server, self.held)
        for one, other in ((near, far), (far, near)):
            one.send(b'last words')
            one.finish()
            self.assertEqual(other.rest(), b'last words')
            if one is near:
                far.send(b'and now?')
                self.assertEqual(near.read(8), b'and now?')
        self.assertIn('done, 10 bytes up, 18 down', self.line())

    def test_urgent_data(self):
        """It stays in the stream, both ways, of telnet's Synch for example."""
        server = self.serve()
        client = self.peer(server.server_address)
        listening = client.request(2, Address('127.0.0.1', 0)).address
        for near, far in (self.tunnel(server, self.held), (client, self.peer(listening))):
            if near is client:
                self.assertEqual(Response.unpack(near.read).reply, 0)
            for one, other in ((near, far), (far, near)):
                one.send(b'before')
                one.sock.send(hexed('fff4fff2'), socket.MSG_OOB)
                one.send(b'after')
                self.assertEqual(other.read(15), b'before' + hexed('fff4fff2') + b'after')

    def test_urgent_data_before_the_end(self):
        """All is there already when the tunnel reads, both ways."""
        server = self.serve()
        for index in (0, 1):
            pair = self.tunnel(server, self.held)
            one, other = pair[index], pair[1 - index]
            one.send(b'x')
            self.assertEqual(other.read(1), b'x')
            with self.busy(self.carried(server)):
                one.sock.send(b'urgent', socket.MSG_OOB)
                one.send(b'after')
                one.finish()
            self.assertEqual(other.rest(), b'urgentafter')
            other.finish()
            self.assertEqual(one.rest(), b'')
            eventually(lambda: not server.clients)

    def test_half_close_by_the_target(self):
        near, far = self.tunnel(self.serve(), self.held)
        far.send(b'bye')
        far.finish()
        self.assertEqual(near.rest(), b'bye')
        near.send(b'x' * 1000000)
        near.finish()
        self.assertEqual(len(far.rest()), 1000000)

    def test_reset_is_passed_on(self):
        server = self.serve()
        for index in (0, 1):
            pair = self.tunnel(server, self.held)
            pair[0].send(b'x')
            pair[1].read(1)
            pair[index].reset()
            with self.assertRaises(ConnectionResetError):
                pair[1 - index].read(1)
        eventually(lambda: len(self.lines) == 2)
        self.assertIn(': client: Connection reset by peer, ', self.lines[0])
        self.assertIn(': target: Connection reset by peer, ', self.lines[1])

    @unittest.skipUnless(socks.ERRORS, 'only epoll tells of it')
    def test_reset_of_a_side_that_has_ended(self):
        """Nobody reads there any more, and still the other side learns of it."""
        self.change(socks.Tunnel, GRACE=0.1)
        server = self.serve()
        for index in (0, 1):
            pair = self.tunnel(server, self.held)
            pair[index].finish()
            self.assertEqual(pair[1 - index].rest(), b'')
            self.assertTrue(server.clients)
            pair[index].reset()
            self.assertEqual(eventually(lambda: pair[1 - index].sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_ERROR)), errno.EPIPE)
            eventually(lambda: not server.clients)

    def carried(self, server):
        """The only tunnel of the server."""
        def found():
            items = [item for loop in server.loops() for item in list(loop.items)]
            return items and isinstance(items[0], socks.Tunnel) and items[0]
        return eventually(found)

    def refusing(self, server, index):
        """Both sides of a tunnel of which one has closed and has just refused some bytes."""
        pair = self.tunnel(server, self.held)
        pair[index].sock.close()
        self.assertEqual(pair[1 - index].rest(), b'')
        pair[1 - index].send(b'goodbye')
        if socks.ERRORS:
            eventually(lambda: self.carried(server).sink_failure)
        return pair[1 - index]

    def test_leave_taken_of_who_has_closed(self):
        """As TLS does, whoever closes first: nothing is missing."""
        server = self.serve()
        for index in (0, 1):
            peer = self.refusing(server, index)
            peer.finish()
            self.assertIn(': done, ', eventually(lambda: self.lines and self.lines.pop()))

    @unittest.skipUnless(socks.ERRORS, 'only epoll tells of it')
    def test_much_for_who_has_closed(self):
        """What is missing is that side's fault, and the other one learns of it."""
        server = self.serve()
        for index, side in (0, 'client'), (1, 'target'):
            with self.subTest(side), self.refusing(server, index) as peer:
                with self.assertRaises(ConnectionError):
                    peer.send_on(b'x' * 1000)
                self.assertIn(f': {side}: Broken pipe, ',
                              eventually(lambda: self.lines and self.lines.pop()))

    @unittest.skipUnless(socks.ERRORS, 'only epoll tells of it')
    def test_silence_after_a_refusal(self):
        self.change(socks.Tunnel, GRACE=0.1)
        server = self.serve()
        for index, side in (0, 'client'), (1, 'target'):
            with self.subTest(side), self.refusing(server, index):
                self.assertIn(f': {side}: Broken pipe, ',
                              eventually(lambda: self.lines and self.lines.pop()))

    @unittest.skipUnless(hasattr(socket, 'TCP_KEEPIDLE'), 'the system has no such option')
    def test_a_half_closed_side_is_looked_for(self):
        self.change(socks.Tunnel, UNPROBED=0.05)
        server = self.serve()
        for index in (0, 1):
            pair = self.tunnel(server, self.held)
            tunnel = self.carried(server)
            before = [pipe.source.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                      for pipe in (tunnel.up, tunnel.down)]
            pair[index].finish()
            pair[1 - index].rest()
            for pipe, idle in zip((tunnel.up, tunnel.down), before):
                self.assertGreater(idle, 30)
                self.assertTrue(pipe.source.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
                eventually(lambda: (
                    pipe.source.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                    pipe.source.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)) == (30, 15))
            pair[1 - index].finish()
            eventually(lambda: not server.clients)

    @unittest.skipUnless(sys.platform == 'linux', 'only Linux tells what was taken')
    def test_slow_reader_is_not_idle(self):
        """While the system still sends what the client was sent long ago."""
        server, size = self.serve(idle_timeout=0.5), 60000
        near = self.peer(server.server_address)
        near.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.assertEqual(near.connect('127.0.0.1', self.held.port).reply, 0)
        far = self.held.take()
        tunnel = self.carried(server)
        far.send(b'x' * size)
        eventually(lambda: tunnel.down.count == size)
        started, count = time.monotonic(), 0
        while count < size:
            self.assertTrue(near.sock.recv(1500))
            count += 1500
            time.sleep(0.02)
        self.assertGreater(time.monotonic() - started, 0.6)
        with self.assertRaises(ConnectionResetError):       # it is now
            near.rest()
        self.assertIn(f': idle, 0 bytes up, {size} down', self.line())

    def test_answer_of_a_target_that_resets(self):
        """A target that refuses an upload, says why and resets: the client still reads why."""
        near, far = self.tunnel(self.serve(), self.held)
        near.send(b'x' * 100000)
        far.read(1)
        far.send(b'413 too large')
        far.sock.close()                        # with unread input: RST
        self.assertEqual(near.read(13), b'413 too large')
        with self.assertRaises(ConnectionError):
            near.send_on(b'x' * 10000)

    @unittest.skipUnless(socks.ERRORS, 'only epoll tells of it')
    def test_reset_while_a_slow_side_reads(self):
        """It is no end for that side either: it gets a part of the data, and a reset."""
        near, far = self.tunnel(self.serve(), self.held)
        far.sock.setblocking(False)
        while ready([], [far.sock], 0.3):
            with contextlib.suppress(BlockingIOError):
                far.send(bytes(1 << 16))
        far.reset()
        with self.assertRaises(ConnectionResetError):
            near.rest()
        self.assertIn(': target: ', self.line())

    def test_back_pressure(self):
        """A receiver that does not read stops the sender; then nothing is lost."""
        server = self.serve()
        for index in (0, 1):
            sender, receiver = self.tunnel(server, self.held)[::1 - 2 * index]
            for peer in (sender, receiver):
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            sent = 0
            sender.sock.setblocking(False)
            while ready([], [sender.sock], 0.3):
                with contextlib.suppress(BlockingIOError):
                    sent += sender.sock.send(b'x' * 65536)
            self.assertLess(sent, 64 << 20)
            sender.finish()
            self.assertEqual(len(receiver.rest()), sent)
            receiver.finish()
        eventually(lambda: not server.clients)
        self.assertEqual([loop.held for loop in server.loops()], [0] * len(server.loops()))

    def test_many_slow_receivers(self):
        """What the server holds for them together has a bound, however much each could take."""
        self.change(socks.Pipe, HELD=1 << 24)
        server = self.serve()
        pairs = [self.tunnel(server, self.held) for _ in range(40)]
        for near, far in pairs:
            near.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            far.sock.setblocking(False)
            while ready([], [far.sock], 0.01):
                with contextlib.suppress(BlockingIOError):
                    far.sock.send(bytes(1 << 18))
        held = sum(loop.held for loop in server.loops())
        self.assertGreater(held, 0)
        self.assertLess(held, len(server.loops()) * (socks.Pipe.HELD + socks.Pipe.LARGEST)
                        + len(pairs) * socks.Pipe.SMALLEST)

    def test_small_buffers(self):
        """Many partial sends, both ways at once."""
        near, far = self.tunnel(self.serve(), self.held)
        for peer in (near, far):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                peer.sock.setsockopt(socket.SOL_SOCKET, option, 4096)
        self.exchange(near, far, 1 << 16)

    def test_early_data(self):
        """What a client sends before the reply goes to the target first, once, in order."""
        early = bytes(range(256)) * 64
        peer = self.peer(self.serve().server_address)
        peer.send(hexed('050100 050100017f000001{port}', port=self.held.port) + early)
        far = self.held.take()
        peer.send(b'late')
        self.assertEqual(far.read(len(early) + 4), early + b'late')

    def test_idle(self):
        """Only what is idle is closed."""
        server = self.serve(idle_timeout=0.4)
        idle, _ = self.tunnel(server, self.held)
        busy, far = self.tunnel(server, self.held)
        started = time.monotonic()
        while not ready([idle.sock], [], 0.02):
            far.send(b'x')
            busy.read(1)
        with self.assertRaises(ConnectionResetError):
            idle.rest()
        self.assertGreater(time.monotonic() - started, 0.3)
        self.assertIn(': idle, ', self.line())
        self.assertEqual(len(server.clients), 1)

    def test_close(self):
        """server_close() ends tunnels, conversations and connects within a second."""
        server = self.serve()
        near, far = self.tunnel(server, self.held)
        talking = self.peer(server.server_address)
        talking.ask(Greeting(b'\0'), Choice)
        dialling = self.peer(server.server_address)
        dialling.ask(Greeting(b'\0'), Choice)
        target = Address('127.0.0.1', self.silent_port())
        dialling.send(Request(1, target).pack())
        eventually(lambda: str(target) in [client.target for client in server.clients])
        self.assertEqual(len(server.clients), 3)
        started = time.monotonic()
        server.server_close()
        self.assertLess(time.monotonic() - started, 1)
        for peer in (near, far):        # which must not take it for the end of what was sent
            with self.assertRaises(ConnectionResetError):
                peer.rest()
        self.assertEqual(talking.rest(), b'')
        self.assertEqual(dialling.read(2), b'\5\1')
        self.assertFalse(server.clients)

    def test_many(self):
        """200 tunnels in one loop, each with its own bytes."""
        server = self.serve(server_class=OneLoop)
        pairs = [self.tunnel(server, self.held) for _ in range(200)]
        for number, (near, far) in enumerate(pairs):
            near.send(b'%08d' % number)
            far.send(b'%08d' % -number)
        for number, (near, far) in enumerate(pairs):
            self.assertEqual(far.read(8), b'%08d' % number)
            self.assertEqual(near.read(8), b'%08d' % -number)


    def test_late_event(self):
        """One that is meant for the conversation does no harm to the tunnel after it."""
        server = self.serve()
        near, client = [self.enter(sock) for sock in socket.socketpair()]
        far, target = [self.enter(sock) for sock in socket.socketpair()]
        for sock in (near, far):
            sock.setblocking(False)

        def conversation():
            yield socks.Wait(reading=[near])
            return socks.Tunnel(task.client, near, far)

        task = socks.Task(socks.Session(server, Address('127.0.0.1', 1)), near, conversation())
        loop = socks.Loop()
        task.start(loop)
        task.ready(near.fileno(), socks.READ)
        task.ready(near.fileno(), socks.READ)
        thread = Background(loop.run)
        client.send(b'x')
        target.settimeout(PATIENCE)
        self.assertEqual(target.recv(1), b'x')
        loop.stop()
        thread.result()
        task.expire()                   # nor does a timer
        loop.close()


class BlockingPoolTest(Case):

    def pool(self, *args):
        pool = socks.BlockingPool(*args)
        self.addCleanup(pool.dismiss)
        return pool

    def hang(self, pool, owner, count, **options):
        """So many jobs of the owner, which end with the test; the list of those that began."""
        begun, event = [], threading.Event()
        self.addCleanup(event.set)

        def job(number):
            begun.append(number)
            event.wait(PATIENCE)

        for number in range(count):
            pool.run(owner, job, number, **options)
        return begun, event

    def test_shares(self):
        """One owner takes most of the threads, several have equal shares, a newcomer has one."""
        pool = self.pool(16)
        begun, events = [], []
        for owner, count in enumerate((11, 3)):
            for each, item in zip((begun, events), self.hang(pool, owner, 30)):
                each.append(item)
            eventually(lambda: len(begun[-1]) == count)
        done = threading.Event()
        pool.run('newcomer', done.set)
        self.assertTrue(done.wait(PATIENCE))
        events[0].set()
        eventually(lambda: list(map(len, begun)) == [30, 11])

    def test_a_thread_that_is_free_goes_to_who_has_none(self):
        pool, order = self.pool(2), []
        _, first = self.hang(pool, 'a', 1)
        _, second = self.hang(pool, 'b', 1)
        for owner in 'aabbc':
            pool.run(owner, order.append, owner)
        first.set()
        second.set()
        eventually(lambda: len(order) == 5)
        self.assertEqual(order[0], 'c')

    def test_limits(self):
        pool = self.pool(2)
        begun, event = self.hang(pool, 'a', 5)
        eventually(lambda: len(begun) == 2)
        with self.assertRaises(RuntimeError):
            pool.run('a', print, at_once=True)
        self.hang(pool, 'a', pool.LONGEST_QUEUE - 3)
        with self.assertRaises(RuntimeError):
            pool.run('a', print)
        event.set()
        eventually(lambda: len(begun) == 5)

    def test_places(self):
        """Few jobs of an owner begin at a time, until these turn out to wait."""
        event = threading.Event()
        self.addCleanup(event.set)

        class Pool(socks.BlockingPool):
            def _watch(self):
                event.wait(PATIENCE)
                super()._watch()

        pool = Pool()
        self.addCleanup(pool.dismiss)
        jobs = [self.hang(pool, owner, 10) for owner in 'ab']
        eventually(lambda: [len(begun) for begun, _ in jobs] == [pool.PLACES] * 2)
        done = threading.Event()
        pool.run('a', done.set, at_once=True)       # on behalf of one that has a place
        self.assertTrue(done.wait(PATIENCE))
        self.assertEqual([len(begun) for begun, _ in jobs], [pool.PLACES] * 2)
        event.set()
        eventually(lambda: [len(begun) for begun, _ in jobs] == [10] * 2)
        for _, end in jobs:
            end.set()
        eventually(lambda: not pool._shares and not pool._watcher)

    def test_no_job_is_lost(self):
        """Also those that come while a thread gives up waiting for one."""
        pool, done = self.pool(1, 0), []
        for number in range(200):
            pool.run('a', done.append, number)
            eventually(lambda: len(done) == number + 1)
        eventually(lambda: not pool._threads)
        self.assertEqual((pool._taken, pool._shares), (0, {}))


class SplicingTunnel(socks.Tunnel):
    """One that splices from its first byte."""

    def start(self, loop, near_events=0):
        pipes = self.client.server._bulk_loops.pipes
        self.up.size = self.down.size = socks.Pipe.LARGEST
        self.up, self.down = (socks.SplicePipe(pipe, pipes) for pipe in (self.up, self.down))
        self.up.twin, self.down.twin = self.down, self.up
        super().start(loop, near_events)

    def move(self, loop, pipes):
        """It stays where it is."""


@unittest.skipUnless(socks.system_splice(), 'the system has no splice()')
class SpliceTest(RelayTest):
    """All that holds for tunnels that copy holds for those that splice."""

    def setUp(self):
        super().setUp()
        self.change(socks, Tunnel=SplicingTunnel)

    def test_many(self):
        """More tunnels than there are pipes: the others copy."""
        super().test_many()

    def test_calm(self):
        """A pipe is given back when reads are small, and taken again when they are large."""
        server = self.serve()
        near, far = self.tunnel(server, self.held)
        pipe = self.carried(server).up
        self.assertTrue(pipe._ends)
        for _ in range(pipe.CALM + 2):
            near.send(b'x')
            far.read(1)
        eventually(lambda: not pipe._ends)
        sent = Background(pour, near, 1 << 25, 1)
        self.assertEqual(drink(far), sent.result())

    def test_one_pipe_for_each_direction(self):
        """However often the reads grow."""
        server = self.serve()
        self.tunnel(server, self.held)
        tunnel = self.carried(server)
        with self.busy(tunnel):
            free = len(tunnel.up._pipes._free)
            tunnel.up.size = tunnel.up.SMALLEST
            while tunnel.up.size < tunnel.up.LARGEST:
                tunnel.up.grow()
            self.assertEqual(len(tunnel.up._pipes._free), free)

    def test_where_it_fails(self):
        """It copies instead."""
        def fail(*_, **__):
            raise OSError(errno.EINVAL, 'no splice here')

        self.change(socks, system_splice=lambda: fail)
        server = self.serve()
        near, far = self.tunnel(server, self.held)
        self.exchange(near, far, 1 << 20)

    def test_no_pipe(self):
        """It copies instead."""
        self.change(socks.SystemPipes, LIMIT=0)
        near, far = self.tunnel(self.serve(), self.held)
        self.exchange(near, far, 1 << 20)


class HelperTest(Case):

    def test_a_half_closed_client_moves(self):
        """To the loop for what carries much, with nothing more to say itself."""
        server, origin = self.serve(), self.origin()
        for size in (1 << 19, 1 << 25):
            near, far = self.tunnel(server, origin)
            near.finish()
            self.assertEqual(far.rest(), b'')
            sent = Background(pour, far, size, 1)
            self.assertEqual(drink(near), sent.result())


class TimersTest(unittest.TestCase):

    class Item:
        due = None

    def test_order_and_change(self):
        timers, (a, b, c) = socks.Timers(), (self.Item() for _ in range(3))
        self.assertEqual(timers.next, float('inf'))
        for item, when in ((a, 10.0), (b, 5.0), (c, 7.0), (a, 1.0), (c, None)):
            timers.set(item, when)
        self.assertAlmostEqual(timers.next, 1.0, delta=0.1)
        self.assertEqual(timers.expired(0.9), [])
        self.assertEqual(timers.expired(6.0), [a, b])
        self.assertEqual(timers.next, float('inf'))
        self.assertEqual(timers.expired(100.0), [])

    def test_a_round_before_does_not_make_it_late(self):
        loop, item = socks.Loop(), self.Item()
        item.expire = loop.stop
        loop.now -= PATIENCE            # as if that round had taken so long
        loop.timers.set(item, time.monotonic() + 0.1)
        began = time.monotonic()
        loop.run()
        loop.close()
        self.assertLess(time.monotonic() - began, PATIENCE / 2)


class WatchTest(unittest.TestCase):

    @unittest.skipUnless(thread_time, 'threads have no clock here')
    def test_slow_step(self):
        """One that keeps a loop busy is found, with what it was."""
        def burn():
            end = thread_time() + 2 * watch.LIMIT
            while thread_time() < end:
                pass

        loop = socks.Loop()
        self.addCleanup(loop.close)
        loop.attempt(loop, time.sleep, 2 * watch.LIMIT)         # no CPU time
        watch.check()
        loop.attempt(loop, burn)
        with self.assertRaisesRegex(AssertionError, r'ms of CPU time in a loop: .*burn'):
            watch.check()
        watch.check()


class OneLoop(socks.Server):
    heavy_loops = 0


# -------------------------------------------------------------------------------------------- BIND

class BindTest(Case):

    def bind(self, server, host='127.0.0.1', kind=Request, source=None):
        """A client that has its first reply, and the address to connect to."""
        peer = self.peer(server.server_address, source)
        if kind is Request:
            peer.ask(Greeting(b'\0'), Choice)
        answer_class = Response if kind is Request else Response4
        first = peer.ask(kind(socks.Command.BIND, Address(host, 0)), answer_class)
        self.assertIn(first[0], (0, 0x5a))
        return peer, first.address

    def test_expected_peer(self):
        """S4-17, R-30, R-31: by address, by name, in SOCKS4a, over IPv6; anybody for zeros."""
        server = self.serve()
        six = self.serve(host='::1') if HAS_IPV6 else None
        for kind, host, answer_class, its in [
                (Request, '127.0.0.1', Response, server), (Request, '0.0.0.0', Response, server),
                (Request, 'localhost', Response, server), (Request, '::1', Response, six),
                (Request4, '127.0.0.1', Response4, server),
                (Request4, '0.0.0.0', Response4, server),
                (Request4, 'localhost', Response4, server), (Request, '::', Response, six)]:
            if not its:
                continue
            with self.subTest(kind=kind, host=host):
                client, address = self.bind(its, host, kind)
                self.assertEqual(address.host, its.server_address.host)
                target = self.peer(address)
                second = answer_class.unpack(client.read)
                self.assertEqual(second[0], 0 if kind is Request else 0x5a)
                self.assertEqual(second.address, target.sock.getsockname()[:2])
                client.send(b'up')
                target.send(b'down')
                self.assertEqual((target.read(2), client.read(4)), (b'up', b'down'))

    def test_only_a_stranger(self):
        """S4-18, R-32: the second reply tells who came instead."""
        server, pairs = self.serve(bind_timeout=0.3), []
        for kind, answer_class, refusal in [(Request, Response, Reply.NOT_ALLOWED),
                                            (Request4, Response4, 0x5b)]:
            client, address = self.bind(server, '127.0.0.1', kind)
            stranger = self.peer(address, ('127.0.0.2', 0))
            pairs.append((client, stranger, answer_class, refusal))
        for client, stranger, answer_class, refusal in pairs:
            self.assertEqual(stranger.rest(), b'')
            self.assertEqual(answer_class.unpack(client.read),
                             answer_class(refusal, Address(*stranger.sock.getsockname())))
            self.assertEqual(client.rest(), b'')

    def test_stranger_first(self):
        """He is turned away, and the one expected can still come."""
        client, address = self.bind(self.serve())
        self.assertEqual(self.peer(address, ('127.0.0.2', 0)).rest(), b'')
        target = self.peer(address)
        self.assertEqual(Response.unpack(client.read).address, target.sock.getsockname())

    def test_nobody(self):
        """S4-19: the time is over."""
        server = self.serve(bind_timeout=0.2)
        (client, _), (client4, _) = self.bind(server), self.bind(server, kind=Request4)
        self.assertEqual(Response.unpack(client.read), Response(Reply.TTL_EXPIRED))
        self.assertEqual(Response4.unpack(client4.read), Response4(0x5b))

    def test_only_peers_that_rules_allow(self):
        """With a request for anybody, too; a rule's ports are those of the request."""
        for rules, port, code in ((['allow bind to 0.0.0.0/0'], 0, 0),
                                  (['allow bind to 0.0.0.0/0 20'], 20, 0),
                                  (['allow bind to 0.0.0.0/32', 'deny to *'], 0, 2)):
            server = self.serve(rules=tuple(rules), bind_timeout=0.5)
            with self.subTest(rules), Peer(server.server_address) as peer:
                first = peer.request(2, Address('0.0.0.0', port))
                self.assertEqual(first.reply, 0)
                with socket.create_connection(first.address):
                    self.assertEqual(Response.unpack(peer.read).reply, code)

    def test_client_leaves(self):
        """Its port is free at once."""
        client, address = self.bind(self.serve())
        client.finish()
        self.assertEqual(client.rest(), b'')
        self.assertIn('BIND 127.0.0.1:0: client: the client left', self.line())
        with self.assertRaises(ConnectionRefusedError):
            self.peer(address)

    def test_early_data(self):
        """What the client sends before the peer comes is kept; a flood of it waits."""
        client, address = self.bind(self.serve())
        client.send(b'early')
        client.sock.settimeout(0.3)
        with self.assertRaises(socket.timeout):
            client.send_on(bytes(1 << 20))
        client.sock.settimeout(PATIENCE)
        target = self.peer(address)
        self.assertEqual(target.read(5), b'early')
        self.assertEqual(target.read(1 << 16), bytes(1 << 16))
        self.assertEqual(Response.unpack(client.read).reply, 0)

    def test_advertise(self):
        """A client on this host is told the address that it came to, not the advertised one."""
        server = self.serve(host='127.0.0.1', advertise=('203.0.113.9',))
        self.assertEqual(self.bind(server)[1].host, '127.0.0.1')


# --------------------------------------------------------------------------------------------- UDP

class Echo:
    """A UDP target that answers each datagram with `prefix` before it."""

    def __init__(self, host='127.0.0.1', prefix=b'E:', port=0):
        self.sock = socket.socket(socks.family_of(possible(host)), socket.SOCK_DGRAM)
        self.sock.bind((host, port))
        self.address = Address(*self.sock.getsockname()[:2])
        self.prefix = prefix
        self.seen, self.senders = [], []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        for data, source in iter(lambda: self.sock.recvfrom(65535), None):
            if data == b'stop':
                return
            self.seen.append(data)
            self.senders.append(source)
            with contextlib.suppress(OSError):
                self.sock.sendto(self.prefix + data, source)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.sock.sendto(b'stop', self.address)
        self.thread.join()
        self.sock.close()


class JoiningTarget:
    """A UDP target that takes datagrams as they were sent: joined (Linux)."""
    UDP_GRO = 104                       # udp(7)

    def __init__(self):
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(('127.0.0.1', 0))
        self.sock.settimeout(PATIENCE)
        self.sock.setsockopt(socket.SOL_UDP, self.UDP_GRO, 1)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.sock.close()

    def datagram(self, payload):
        """One for it, with its header."""
        return Datagram(Address(*self.sock.getsockname()), payload).pack()

    def receive(self):
        """The payloads that were sent together."""
        return self.sock.recv(65535)


class Associate:
    """A client with a UDP association."""

    def __init__(self, server, hint=Address('0.0.0.0', 0), credentials=None):
        self.control = Peer(server.server_address)
        self.control.ask(Greeting(b'\2' if credentials else b'\0'), Choice)
        if credentials:
            self.control.ask(credentials, Verdict)
        self.sock = socket.socket(socks.family_of(server.server_address.host), socket.SOCK_DGRAM)
        self.sock.bind((server.server_address.host, 0))
        self.sock.settimeout(PATIENCE)
        if hint == 'own':
            hint = Address(*self.sock.getsockname()[:2])
        self.response = self.control.ask(Request(3, hint), Response)
        self.relay = self.response.address

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.control.sock.close()
        self.sock.close()

    def send(self, data, sock=None):
        (sock or self.sock).sendto(data, self.relay)

    def receive(self):
        while True:
            data, source = self.sock.recvfrom(65535)
            if source[:2] == self.relay:
                return data

    def ask(self, data):
        self.send(data)
        return self.receive()

    def nothing_comes(self, seconds=0.1):
        """From the relay, that is: another program may mean the last user of this port."""
        while ready([self.sock], [], seconds):
            if self.sock.recvfrom(65535)[1][:2] == self.relay:
                return False
        return True


def header_length(data):
    """Of a datagram with a header."""
    return 7 + data[4] if data[3] == 3 else {1: 10, 4: 22}[data[3]]


class StreamAssociate(Associate):
    """A client with an association whose datagrams travel in its connection, after command 05."""

    def __init__(self, server, wrap=None, early=b''):
        sock = socket.create_connection(server.server_address[:2], PATIENCE)
        self.control = Peer(wrap(sock) if wrap else sock)
        self.sock = self.control.sock
        self.control.ask(Greeting(b'\0'), Choice)
        self.control.send(hexed('05050001 00000000 0000') + early)
        self.response = Response.unpack(self.control.read)

    @staticmethod
    def message(data):
        end = header_length(data)
        return struct.pack('!HB', len(data) - end, end) + data[3:]

    def send(self, data):
        self.control.send(self.message(data))

    def receive(self):
        size, end = struct.unpack('!HB', self.control.read(3))
        return b'\0\0\0' + self.control.read(end - 3 + size)

    def nothing_comes(self, seconds=0.1):
        return not ready([self.sock], [], seconds)


class Associate6(StreamAssociate):
    """A client with a SOCKS6 association, whose datagrams travel in its connection, or over UDP."""

    def __init__(self, server, by_udp=False, wrap=None, early=b''):
        sock = socket.create_connection(server.server_address[:2], PATIENCE)
        self.control = Peer(wrap(sock) if wrap else sock)
        self.control.send(hexed('0603 0000 0000 00 01 00000000'))
        self.verdict = Verdict6.unpack(self.control.read)
        self.response = Response6.unpack(self.control.read)
        if self.response.reply == 0:
            start = self.control.read(12)
            assert start.startswith(hexed('0601 000c')), start
            self.id = start[4:]
        self.sock = self.control.sock
        self.is_confirmed = False
        if by_udp:
            self.sock = socket.socket(socks.family_of(server.server_address.host),
                                      socket.SOCK_DGRAM)
            self.sock.settimeout(PATIENCE)
            self.sock.connect(self.response.address)

    def message(self, data):
        end = header_length(data)
        host, port = data[4:end - 2], data[end - 2:end]
        if data[3] == 3:
            host += bytes(-len(host) % 4)
        return struct.pack('!BBH8sBB', 6, 3, 16 + len(host) + len(data) - end, self.id, data[3],
                           0) + port + host + data[end:]

    def send(self, data):
        self.sock.sendall(self.message(data))

    def receive(self):
        if not self.is_confirmed:
            self.is_confirmed = True
            assert self.control.read(12) == hexed('0602 000c') + self.id
        read = self.control.read
        if self.sock is not self.control.sock:
            read = io.BytesIO(self.sock.recv(65535)).read
        version, kind, size, which, atyp, zero, port = struct.unpack('!BBH8sBB2s', read(16))
        assert (version, kind, which, zero) == (6, 3, self.id, 0)
        host = read({1: 4, 4: 16}[atyp])
        return bytes((0, 0, 0, atyp)) + host + port + read(size - 16 - len(host))


# (name, datagrams to send, the answer or '' to each); {port} is the target's.
DATAGRAM_VECTORS = [
    ('U-10', ['000000017f000001{port}6f6e65'], ['000000017f000001{port}453a6f6e65']),
    ('U-11', ['00000003096c6f63616c686f7374{port}74776f'], ['000000017f000001{port}453a74776f']),
    ('U-12', ['00000003093132372e302e302e31{port}78'], ['000000017f000001{port}453a78']),
    ('U-13', ['0000000400000000000000000000ffff7f000001{port}78'],
     ['000000017f000001{port}453a78']),
    ('U-14', ['000000017f000001{port}'], ['000000017f000001{port}453a']),
    ('U-15', ['000100017f000001{port}78'], ['000000017f000001{port}453a78']),
    ('U-17', ['000001017f000001{port}4142', '000082017f000001{port}4344'],
     ['', '000000017f000001{port}453a41424344']),
    ('U-18', ['000001017f000001{port}4142', '000001017f000001{port}5859',
              '000082017f000001{port}5a'], ['', '', '000000017f000001{port}453a58595a']),
    ('U-19', ['000001017f000001{port}41', '000083017f000001{port}43'], ['', '']),
    ('U-20', ['000081017f000001{port}41'], ['000000017f000001{port}453a41']),
    ('U-21', ['000001017f000001{port}41', '000000017f000001{port}42', '000082017f000001{port}43'],
     ['', '000000017f000001{port}453a42', '']),
    ('U-22', ['000000017f'], ['']),
    ('U-23', ['000000027f000001{port}78'], ['']),
    ('position 0', ['000080017f000001{port}41'], ['']),
    ('duplicate', ['000001017f000001{port}41', '000002017f000001{port}42',
                   '000002017f000001{port}42', '000083017f000001{port}43'],
     ['', '', '', '000000017f000001{port}453a414243']),
    ('other address', ['000001017f000001{port}41', '000082017f000002{port}42'], ['', '']),
    ('no header', ['', '00', '00000001'], ['', '', '']),
    ('denied, nowhere, port 0', ['0000000100000000{port}78', '00000001cb0071010000',
                                 '000000030a6e6f2e696e76616c6964{port}78'], ['', '', '']),
]


class DatagramCase(Case):

    def associate(self, server, *args):
        return self.enter(Associate(server, *args))

    def echo(self, *args):
        return self.enter(Echo(*args))

    def check_bursts(self, client, relay, sizes, hosts=('127.0.0.1',)):
        """Send datagrams of these sizes to a target at each of the hosts, and their payloads back,
        all at once each time: nothing is lost or changed, and those of each target are in order."""
        payloads = [random_bytes(random.Random(place), size) for place, size in enumerate(sizes)]
        targets = [self.enter(socket.socket(socks.family_of(host), socket.SOCK_DGRAM))
                   for host in hosts]
        for target, host in zip(targets, hosts):
            target.bind((host, 0))
            target.settimeout(PATIENCE)
            target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            client.send(Datagram(Address.of(target.getsockname()), b'').pack())
        sources = [target.recvfrom(1)[1] for target in targets]
        addresses = [Address.of(target.getsockname()) for target in targets]
        sent = [(place % len(hosts), payload) for place, payload in enumerate(payloads)]

        def counts():
            return [relay.up.count, relay.up.bytes, relay.down.count, relay.down.bytes]

        with self.busy(relay):
            before = counts()
            for target, payload in sent:
                client.send(Datagram(addresses[target], payload).pack())
        for target, payload in sent:
            self.assertEqual(targets[target].recv(65535), payload)
        with self.busy(relay):
            for target, payload in sent:
                targets[target].sendto(payload, sources[target])
        answers = [Datagram.unpack(client.receive()) for _ in sent]
        for target, address in enumerate(addresses):
            self.assertEqual([answer for answer in answers if answer.address == address],
                             [Datagram(address, payload) for to, payload in sent if to == target])
        eventually(lambda: counts() == [number + more for number, more in zip(
            before, [len(sizes), sum(sizes)] * 2)])
        self.assertEqual(relay.dropped, 0)

    def check_vectors(self, client, echo, is_sent=lambda data: True):
        """The answers to those datagrams of DATAGRAM_VECTORS for which is_sent(data)."""
        each = [(name, hexed(datagram, port=echo.address.port),
                 hexed(answer, port=echo.address.port))
                for name, datagrams, answers in DATAGRAM_VECTORS
                for datagram, answer in zip(datagrams, answers)]
        for name, data, answer in each:
            if not is_sent(data):
                continue
            with self.subTest(name, datagram=data.hex()):
                client.send(data)
                if answer:
                    self.assertEqual(client.receive(), answer)

    def check_way(self, client, largest=65497):
        """What holds on each way of datagrams: whole ones are answered, names, both families and
        all sizes; in order; the malformed ones are dropped."""
        self.assertEqual(client.response.reply, 0)
        echo = self.echo()
        self.check_vectors(client, echo, lambda data: (
            data[2:3] == b'\0' and len(data) > 8 and data[3] != 2))
        echo.prefix = b''
        if HAS_IPV6:
            six = self.echo('::1')
            answer = client.ask(Datagram(six.address, b'six').pack())
            self.assertEqual(Datagram.unpack(answer), Datagram(six.address, b'E:six'))
        for size in (0, 1, 1472, 9000, 60000, largest):
            payload = random.Random(size).getrandbits(8 * size + 1).to_bytes(size + 1, 'big')[1:]
            answer = Datagram.unpack(client.ask(Datagram(echo.address, payload).pack()))
            self.assertEqual(answer, Datagram(echo.address, payload))
        for number in range(100):
            client.send(Datagram(echo.address, b'%d' % number).pack())
        self.assertEqual([int(Datagram.unpack(client.receive()).payload) for _ in range(100)],
                         list(range(100)))
        self.assertTrue(client.nothing_comes(0.02))

    def stream(self, server, *args):
        return self.enter(StreamAssociate(server, *args))


class UdpTest(DatagramCase):

    def test_vectors(self):
        """U-10 to U-23, also with the target known already, and the association intact."""
        echo = self.echo()
        client = self.associate(self.serve())
        self.check_vectors(client, echo)
        self.check_vectors(client, echo)
        self.assertTrue(client.nothing_comes())
        self.assertEqual(client.ask(Datagram(echo.address, b'!').pack())[-3:], b'E:!')

    def test_hints(self):
        """U-01 to U-06: any DST is fine, and the answer is of the control connection's family."""
        server, echo = self.serve(), self.echo()
        for hint in (Address('0.0.0.0', 0), 'own', Address('0', 50000), Address('::', 0),
                     Address('127.0.0.1', 0),
                     echo.address, Address('8.8.8.8', 53), Address('nowhere.invalid', 9)):
            with self.subTest(hint), Associate(server, hint) as client:
                self.assertEqual(client.response.reply, 0)
                self.assertEqual(client.relay.host, '127.0.0.1')
                self.assertEqual(client.ask(Datagram(echo.address, b'x').pack())[-3:], b'E:x')
        peer = self.peer(server.server_address)
        peer.send(hexed('050100 05030003000000'))
        self.assertEqual(peer.read(12)[:10], hexed('0500 050000017f000001'))

    def test_owner(self):
        """U-24: a stranger's datagrams are dropped, and do not lock the owner out."""
        server, echo = self.serve(), self.echo()
        strangers = []
        for host in ('127.0.0.2', '127.0.0.1'):
            strangers.append(self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
            strangers[-1].bind((host, 0))
        data = Datagram(echo.address, b'stranger').pack()
        for hint, rogues in ((Address('0.0.0.0', 0), strangers[:1]), ('own', strangers)):
            client = self.associate(server, hint)
            for rogue in rogues:
                client.send(data, rogue)
            self.assertEqual(client.ask(Datagram(echo.address, b'owner').pack())[-7:], b'E:owner')
            del echo.seen[:]
            for rogue in strangers:
                client.send(data, rogue)
            self.assertEqual(client.ask(Datagram(echo.address, b'again').pack())[-7:], b'E:again')
            self.assertEqual(echo.seen, [b'again'])

    def test_strangers_in_the_queue(self):
        """What has come before the socket is connected to the client is looked at, too."""
        self.change(socks.Loop, ROUND_TIME=0.0002)
        server, echo = self.serve(), self.echo()
        client, stranger = self.associate(server), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.enter(stranger).bind(('127.0.0.2', 0))
        relay = self.relay_in(server)
        with self.busy(relay):
            client.send(Datagram(echo.address, b'owner').pack())
            for _ in range(200):
                client.send(Datagram(echo.address, b'stranger').pack(), stranger)
        self.assertEqual(client.receive()[-7:], b'E:owner')
        eventually(lambda: relay.dropped == 200)
        self.assertEqual(echo.seen, [b'owner'])

    def test_ends_with_the_connection(self):
        """U-25: within a second, by whatever end; what the client says there means nothing."""
        server, echo = self.serve(), self.echo()
        for end in (Peer.finish, Peer.reset):
            client = self.associate(server)
            client.control.send(b'junk' * 10000)
            data = Datagram(echo.address, b'x').pack()
            client.ask(data)
            end(client.control)
            eventually(lambda: not server.clients)
            client.send(data)
            self.assertTrue(client.nothing_comes())
        self.assertIn('UDP_ASSOCIATE', self.line())
        self.assertIn('done, 1 bytes up, 3 down', self.lines[0])

    def test_another_port_of_the_client(self):
        """It takes over when the first one is silent, unless the client is on this host."""
        class Elsewhere(socks.Handler):
            def do_UDP_ASSOCIATE(self, request):
                relay = yield from super().do_UDP_ASSOCIATE(request)
                relay.is_here = False
                return relay

        self.change(socks.UdpRelay, SILENCE=0.03)
        echo = self.echo()
        data = Datagram(echo.address, b'x').pack()
        for handler in (socks.Handler, Elsewhere):
            for hint in (Address('0.0.0.0', 0), 'own', echo.address):
                server = self.serve(handler)
                client = self.associate(server, hint)
                client.ask(data)
                relay = self.relay_in(server)
                first = self.enter(client.sock)
                client.sock = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                client.sock.bind(('127.0.0.1', 0))
                client.sock.settimeout(PATIENCE)
                if handler is socks.Handler or hint == 'own':
                    time.sleep(0.1)
                    client.send(data)
                    self.assertTrue(client.nothing_comes(0.05))
                    continue
                eventually(lambda: not relay.owner)
                self.assertEqual(client.ask(data)[-3:], b'E:x')
                client.send(data, first)
                self.assertEqual(client.ask(data)[-3:], b'E:x')
                self.assertEqual(relay.up.count, 3)
                eventually(lambda: not relay.owner)
                self.assertEqual(client.ask(data)[-3:], b'E:x')         # the same one again

    def test_announced_port_takes_over(self):
        """What another program has sent before is still relayed, not its answers."""
        server, echo = self.serve(), self.echo('127.0.0.1', b'')
        client = self.associate(server, 'own')
        other = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        other.bind(('127.0.0.1', 0))
        client.send(Datagram(echo.address, b'0').pack(), other)
        eventually(lambda: echo.seen)
        with self.busy(self.relay_in(server)):
            for number in range(10):
                client.send(Datagram(echo.address, b'%d' % number).pack(),
                            other if number < 5 else None)
        answers = [Datagram.unpack(client.receive()).payload for _ in range(5)]
        self.assertEqual(answers, [b'%d' % number for number in range(5, 10)])
        self.assertEqual(echo.seen[1:], [b'%d' % number for number in range(10)])

    def test_targets_alone(self):
        """They keep an association for longer than a silence, not for ever."""
        client = self.associate(self.serve(udp_timeout=0.2))
        target = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        target.bind(('127.0.0.1', 0))
        target.settimeout(PATIENCE)
        client.send(Datagram(Address(*target.getsockname()), b'subscribe').pack())
        started, (_, relay) = time.monotonic(), target.recvfrom(100)
        while not self.lines:
            self.assertLess(time.monotonic(), started + PATIENCE)
            target.sendto(b'news', relay)
            time.sleep(0.01)
        self.assertGreater(time.monotonic(), started + 0.4)
        self.assertIn(': idle, ', self.lines[0])

    def test_log_line(self):
        """How many targets and datagrams, and at DEBUG each target; not what the client said of
        itself."""
        echoes = [self.echo(), self.echo()]
        self.addCleanup(socks.log.setLevel, socks.log.level)
        socks.log.setLevel(logging.DEBUG)
        with Associate(self.serve(), Address('198.51.100.7', 5)) as client:
            for echo in echoes * 2:
                client.ask(Datagram(echo.address, b'x').pack())
            client.ask(Datagram(Address('localhost', echoes[0].address.port), b'x').pack())
        line = eventually(lambda: [line for line in self.lines if ' bytes up' in line])[0]
        # On a busy machine ask() repeats a datagram.
        self.assertRegex(line, r' UDP_ASSOCIATE 3 targets, \d+ datagrams up, \d+ down: done, '
                               r'\d+ bytes up, \d+ down')
        steps = [line.partition(': datagrams to ')[2] for line in self.lines
                 if ': datagrams to ' in line]
        self.assertEqual(steps, [*(str(echo.address) for echo in echoes),
                                 f'localhost, {echoes[0].address}'])

    def test_idle(self):
        client = self.associate(self.serve(udp_timeout=0.2))
        self.assertEqual(client.control.rest(), b'')
        self.assertIn(': idle, ', self.line())

    def test_both_families(self):
        """IPv4 and IPv6 targets in one association, over either."""
        four, six = self.echo(), self.echo('::1')
        for host in ('127.0.0.1', '::1'):
            client = self.associate(self.serve(host=host))
            self.assertEqual(client.relay.host, host)
            for echo in (four, six):
                answer = Datagram.unpack(client.ask(Datagram(echo.address, b'x').pack()))
                self.assertEqual(answer, Datagram(echo.address, b'E:x'))

    def test_sizes(self):
        """Every size arrives whole, the largest too, or not at all."""
        echo = self.echo('127.0.0.1', b'')
        client = self.associate(self.serve())
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        for size in (0, 1, 1472, 9000, 65496, 65497):
            payload = random_bytes(random.Random(size), size)
            answer = Datagram.unpack(client.ask(Datagram(echo.address, payload).pack()))
            self.assertEqual(answer.payload, payload)
        echo.prefix = b'1'                      # too large for the header
        client.send(Datagram(echo.address, bytes(65497)).pack())
        self.assertTrue(client.nothing_comes())

    def test_bursts(self):
        """With and without sending several at once: of one size and of many, to several targets."""
        random_sizes = random.Random(1).choices((0, 1, 64, 1200, 1201), k=50)
        six = '::1' if HAS_IPV6 else '127.0.0.2'
        for most in socks.Burst.MOST, 1:
            self.change(socks.Burst, MOST=most)
            server = self.serve()
            client = self.associate(server)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            relay = self.relay_in(server)
            for sizes, hosts in (([512] * 30, ['127.0.0.1']),
                                 ([1200] * 7 + [300] + [1200] * 7 + [0, 0, 1, 1, 2], ['127.0.0.2']),
                                 ([20000] * 4 + [30000, 30000, 10], ['127.0.0.1']),
                                 ([100] * 20, ['127.0.0.1', '127.0.0.2']),
                                 (random_sizes, ['127.0.0.1']),
                                 (random_sizes, ['127.0.0.1', '127.0.0.2', '127.0.0.3']),
                                 # The same sizes with headers of 22 and 10 bytes.
                                 ([100, 112] * 10, [six, '127.0.0.1'])):
                with self.subTest(sizes=sizes, hosts=hosts, most=most):
                    self.check_bursts(client, relay, sizes, hosts)
            server.server_close()

    @unittest.skipUnless(socks.can_segment(), 'the system has no UDP_SEGMENT')
    def test_a_burst_is_sent_at_once(self):
        """A target that takes joined datagrams gets them in one piece."""
        self.change(socks.Loop, ROUND_TIME=PATIENCE)
        server, target = self.serve(), self.enter(JoiningTarget())
        client = self.associate(server)
        client.send(target.datagram(b'0'))
        self.assertEqual(target.receive(), b'0')
        relay = self.relay_in(server)
        with self.busy(relay):
            for number in range(10):
                client.send(target.datagram(b'%d' % number))
        self.assertEqual([target.receive() for _ in range(2)], [b'01234567', b'89'])
        with self.busy(relay):          # as many as fit into one datagram
            for _ in range(4):
                client.send(target.datagram(bytes(20000)))
        self.assertEqual([len(target.receive()) for _ in range(2)], [60000, 20000])
        for number in range(2):         # a fragment and a header with RSV come after the others
            with self.busy(relay):
                for payload in b'1', b'2', b'3':
                    client.send(target.datagram(payload))
                client.send((b'\0\1\0', b'\0\0\x01')[number] + target.datagram(b'4')[3:])
                client.send(b'\0\0\x82' + target.datagram(b'5')[3:])
            self.assertEqual([target.receive() for _ in range(2)],
                             [b'123', (b'4', b'45')[number]])

    @unittest.skipUnless(socks.can_segment(), 'the system has no UDP_SEGMENT')
    def test_errors_of_bursts(self):
        """Only a size that the system does not take ends the joining of datagrams."""
        self.change(socks.Loop, ROUND_TIME=PATIENCE)
        server, target = self.serve(), self.enter(JoiningTarget())
        client = self.associate(server)
        client.send(target.datagram(b'0'))
        self.assertEqual(target.receive(), b'0')
        closed = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        closed.bind(('127.0.0.1', 0))
        closed.connect(('127.0.0.1', 9))        # not a port of ours: it takes nothing
        relay = self.relay_in(server)
        for address in (Address(*closed.getsockname()), Address('255.255.255.255', 9),
                        Address('127.0.0.1', 0)):
            with self.busy(relay):
                for _ in range(8):
                    client.send(Datagram(address, b'x').pack())
                for number in range(8):
                    client.send(target.datagram(b'%d' % number))
            self.assertEqual(target.receive(), b'01234567')

    def test_anybody_may_answer(self):
        """From an address that the client did not send to; not so with udp_strict."""
        echo = self.echo()
        for strict in (False, True):
            client = self.associate(self.serve(udp_strict=strict))
            client.ask(Datagram(echo.address, b'x').pack())
            relay = self.relay_of(client, echo)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.bind(('127.0.0.2', 0))
                other.sendto(b'hello', relay)
                if strict:
                    self.assertTrue(client.nothing_comes())
                else:
                    self.assertEqual(client.receive(),
                                     Datagram(Address(*other.getsockname()), b'hello').pack())

    def relay_of(self, client, echo):
        """Where the targets see the client's datagrams come from."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.bind(('127.0.0.1', 0))
            target.settimeout(PATIENCE)
            client.send(Datagram(Address(*target.getsockname()), b'who?').pack())
            return target.recvfrom(100)[1]

    def test_slow_look_ups(self):
        """They hold up neither other look-ups nor all threads, and may outlast the client."""
        event = self.slow_names()
        server, echo = self.serve(), self.echo()
        client = self.associate(server)
        self.scripted_names(lambda name: ['127.0.0.1'])
        relay = self.relay_in(server)
        for number in range(40):
            client.send(Datagram(Address('%d.slow' % number, 9), b'').pack())
        eventually(lambda: relay.routes._count == 40)
        name = Address('good.test', echo.address.port)
        client.send(Datagram(name, b'x').pack())
        eventually(lambda: relay.targets)
        self.assertEqual(client.receive()[-3:], b'E:x')
        for number in range(40, 200):
            client.send(Datagram(Address('%d.slow' % number, 9), b'').pack())
        self.assertEqual(client.ask(Datagram(echo.address, b'x').pack())[-3:], b'E:x')
        self.assertLess(server._pool._taken, server._pool.size - server._pool.size // 8)
        client.control.finish()
        eventually(lambda: self.lines)
        event.set()
        with Peer(server.server_address) as peer:
            peer.connect('localhost', 1)

    def test_many_names_at_once(self):
        """All are looked up, a few at a time; beyond hundreds they are dropped."""
        event = threading.Event()
        self.addCleanup(event.set)
        self.scripted_names(lambda name: event.wait(PATIENCE) and ['127.0.0.1'])
        echo = self.echo()
        for number, answered in ((400, 400), (700, socks.Routes.QUEUE)):
            event.clear()
            server = self.serve()
            client = self.associate(server)
            relay = self.relay_in(server)
            routes = relay.routes
            for each in range(number):
                name = Address(f'n{each}.test', echo.address.port)
                client.send(Datagram(name, b'%d' % each).pack())
                if each % 50 == 49:     # what the system drops tests nothing
                    eventually(lambda: routes._count + relay.dropped > each)
            self.assertEqual(routes._count, answered)
            self.assertEqual(routes._under_way, routes.LOOKUPS)
            event.set()
            eventually(lambda: relay.targets == answered)
            self.assertEqual((routes._count, routes._size, routes._queues), (0, 0, {}))
            eventually(lambda: not relay.errands)
            self.assertEqual(relay.up.count, answered)

    def test_waiting_bytes(self):
        """They are bounded as well."""
        event = self.slow_names()
        server = self.serve()
        client = self.associate(server)
        relay = self.relay_in(server)
        for number in range(8):
            client.send(Datagram(Address(f'{number}.slow', 9), bytes(60000)).pack())
            eventually(lambda: relay.routes._count + relay.dropped > number)
        self.assertLessEqual(relay.routes._size, relay.routes.ROOM)
        self.assertGreater(relay.routes._count, 2)
        event.set()

    def test_memory(self):
        """Names are remembered as far as there is room for them."""
        latest = socks.Latest(5)
        for number in range(10):
            latest.remember(bytes([number]), number)
        latest.remember(bytes([7]), 'again')
        self.assertEqual(list(latest.values()), [5, 6, 8, 9, 'again'])
        latest = socks.Latest(1024)
        for number in range(1024):
            latest.remember(bytes(260) + bytes([number % 256, number // 256]), number)
        self.assertLessEqual(sum(map(len, latest)), latest.ROOM)
        self.assertIn(1023, latest.values())
        latest.clear()
        latest.remember(b'x', 1)
        self.assertEqual(latest, {b'x': 1})

    def test_name_that_changes(self):
        """It is looked up again; the old address serves until the new one is there."""
        self.change(socks.Routes, REFRESH=0.05)
        self.change(socks.Resolver, MEMORY=0.04)
        old = self.echo('127.0.0.1', b'old:')
        new = self.enter(Echo('127.0.0.2', b'new:', old.address.port))
        hosts, event, asked = ['127.0.0.1'], threading.Event(), []
        self.addCleanup(event.set)

        def hosts_of(name):
            asked.append(name)
            if len(asked) > 1:
                event.wait(PATIENCE)
            return hosts

        self.scripted_names(hosts_of)
        client = self.associate(self.serve())
        data = Datagram(Address('changes.test', old.address.port), b'x').pack()
        self.assertEqual(client.ask(data)[-5:], b'old:x')
        eventually(lambda: client.ask(data) and len(asked) > 1)
        self.assertEqual(client.ask(data)[-5:], b'old:x')
        hosts[:] = ['127.0.0.2']
        event.set()
        eventually(lambda: client.ask(data)[-5:] == b'new:x')
        hosts[:] = ['127.0.0.1', '127.0.0.2']           # in another order
        before = len(asked)
        eventually(lambda: client.ask(data) and len(asked) > before + 1)
        self.assertEqual(client.ask(data)[-5:], b'new:x')
        hosts[:] = []                   # it is not found any more
        before = len(asked)
        eventually(lambda: client.ask(data) and len(asked) > before + 1)
        self.assertEqual(client.ask(data)[-5:], b'new:x')
        self.assertEqual(new.seen[-1], b'x')

    @needs_ipv6
    def test_name_of_both_families(self):
        """While nothing comes back from one, the other gets datagrams too; what answers is kept."""
        # Within this host IPv6 comes first.
        for name, alive, dead, trial in (('alive.test', '::1', '127.0.0.1', 60),
                                         ('dead.test', '127.0.0.1', '::1', 0.05)):
            self.scripted_names(lambda name: [alive, dead])
            echo = self.echo(alive)
            silent = self.enter(socket.socket(socks.family_of(dead), socket.SOCK_DGRAM))
            silent.bind((dead, echo.address.port))
            client = self.associate(self.serve(udp_strict=True))
            with self.subTest(name, alive=alive):
                self.change(socks.Routes, TRIAL=trial)
                data = Datagram(Address(name, echo.address.port), b'x').pack()
                client.send(data)
                while client.nothing_comes(0.02 if name[0] == 'd' else PATIENCE):
                    client.send(data)
                while not client.nothing_comes(0.1):
                    pass
                received = 0
                while ready([silent], [], 0):
                    received += len(silent.recv(100))
                self.assertEqual(bool(received), name[0] == 'd')
                time.sleep(0.1)         # twice TRIAL
                for _ in range(3):
                    self.assertEqual(client.ask(data)[-3:], b'E:x')
                self.assertFalse(ready([silent], [], 0))

    @needs_ipv6
    def test_first_datagram_to_both_families(self):
        """Also if the client does not send another one."""
        self.change(socks.Routes, TRIAL=0.05)
        self.scripted_names(lambda name: ['::1', '127.0.0.1'])
        echo = self.echo()
        silent = self.enter(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        silent.bind(('::1', echo.address.port))
        client = self.associate(self.serve())
        answer = client.ask(Datagram(Address('both.test', echo.address.port), b'once').pack())
        self.assertEqual(Datagram.unpack(answer), Datagram(echo.address, b'E:once'))

    def test_new_targets_take_turns(self):
        """The time that it takes to judge them does not make others wait: each in a round of its
        own."""
        rounds = []

        class Slow(socks.Server):
            def authorize(self, client, target, name=None):
                end = time.monotonic() + 0.002
                while time.monotonic() < end:
                    pass
                rounds.append(self.loop.now)

        server = self.serve(server_class=Slow)
        client = self.associate(server)
        for port in range(1, 61):
            client.send(Datagram(Address('127.0.0.1', port), b'').pack())
        eventually(lambda: len(rounds) == 60)
        self.assertEqual(len(set(rounds)), 60)

    def test_receive_buffers(self):
        """As large as the system lets them be."""
        plain = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with contextlib.suppress(OSError):
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        wanted = plain.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        server, echo = self.serve(), self.echo()
        client = self.associate(server)
        client.ask(Datagram(echo.address, b'x').pack())
        relay = self.relay_in(server)
        for sock in (relay.near, *relay.far.values()):
            self.assertGreaterEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), wanted)

    def test_no_rule_allows_it(self):
        """Then there is no association; one rule for some target is enough."""
        for rules, reply in ((['deny udp to *', 'allow to *'], 2), (['allow connect to *'], 2),
                             (['deny to 0.0.0.0/0', 'deny to ::/0', 'allow to *'], 2),
                             (['allow udp from 192.0.2.0/24 to *'], 2), ([], 2),
                             (['deny udp to * 1-1023', 'allow udp to * 53'], 0),
                             (['deny to 0.0.0.0/0', 'allow udp to *'], 0),
                             (['deny to .example.org', 'allow udp to .example.net'], 0)):
            with self.subTest(rules):
                rules = tuple(socks.parse_rule(rule, 'here') for rule in rules)
                with Associate(self.serve(rules=rules)) as client:
                    self.assertEqual(client.response.reply, reply)

    def test_shared_ports(self):
        """A client from elsewhere takes half of a range at most, and none is lost."""
        ports, free = socks.UdpPorts(), array.array('H', range(100, 1100))
        for _ in range(2):
            taken = [ports._take(free) for _ in range(1000)]
            self.assertEqual(sorted(taken), list(range(100, 1100)))
            self.assertNotEqual(taken, sorted(taken))
            free.extend(taken)
        first = unused_port()
        wanted = first, first + 3
        held = [ports.bind('127.0.0.1', wanted, None)]
        held += [ports.bind('127.0.0.1', wanted, 'a') for _ in range(2)]
        with self.assertRaisesRegex(OSError, 'half'):
            ports.bind('127.0.0.1', wanted, 'a')
        held.append(ports.bind('127.0.0.1', wanted, 'b'))
        self.assertEqual({sock.getsockname()[1] for sock, _ in held}, set(range(first, first + 4)))
        with self.assertRaisesRegex(OSError, 'no UDP port from .* is free'):
            ports.bind('127.0.0.1', wanted, 'c')
        for sock, release in held:
            sock.close()
            release()
        (free, owners), = ports._ranges.values()
        self.assertEqual((sorted(free), owners), ([*range(first, first + 4)], {}))
        held = [ports.bind('127.0.0.1', other, None) for other in (wanted, (first, first + 1))]
        self.assertEqual(len(ports._ranges), 2)
        for sock, release in held:
            sock.close()
            release()
        sock, _ = ports.bind('127.0.0.1', (first, first + 2), None)     # no range is left over
        sock.close()
        self.assertEqual(len(ports._ranges), 1)

    def test_ports_are_given_back(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(('127.0.0.1', 0))
            port = sock.getsockname()[1]
        server = self.serve(udp_ports=(port, port))
        for _ in range(3):
            with Associate(server) as client:
                self.assertEqual(client.relay.port, port)
            eventually(lambda: not server.clients)

    def test_port_range(self):
        """Full, it is a refusal and a line in the log."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(('127.0.0.1', 0))
            port = sock.getsockname()[1]
        server = self.serve(udp_ports=(port, port))
        first = self.associate(server)
        self.assertEqual(first.relay, ('127.0.0.1', port))
        with Associate(server) as second:
            self.assertEqual(second.response, Response(Reply.GENERAL_FAILURE))
        self.assertIn(f'no UDP port from {port} to {port} is free', self.line())

    def test_many_targets(self):
        """For the latest one, the one that was first is forgotten."""
        self.change(socks.Routes, LIMIT=2)
        server = self.serve(udp_strict=True)
        client, targets = self.enter(Associate(server)), [self.enter(Echo()) for _ in range(3)]
        for target in targets:
            self.assertIn(b'E:x', client.ask(Datagram(target.address, b'x').pack()))
        relay = self.relay_in(server)
        self.assertEqual(list(relay.routes.headers), [tuple(each.address) for each in targets[1:]])
        self.assertEqual(len(relay.routes.known), 2)
        for name in ('localhost', '127.0.0.1'):         # one target by two names
            client.ask(Datagram(Address(name, targets[0].address.port), b'x').pack())
        client.ask(Datagram(targets[1].address, b'x').pack())
        self.assertIn(b'E:x', client.ask(Datagram(targets[0].address, b'x').pack()))

    def test_not_in_socks4(self):
        peer = self.peer(self.serve().server_address)
        self.assertEqual(peer.ask(Request4(3, Address('127.0.0.1', 1)), Response4), Response4(0x5b))

    @needs_ipv6
    def test_version_of_ip(self):
        """Also for IP addresses, as for connections."""
        four, six = self.echo(), self.echo('::1')
        for version, good, bad in ((4, four, six), (6, six, four)):
            client = self.stream(self.serve(family=version))
            client.send(Datagram(bad.address, b'x').pack())
            self.assertEqual(Datagram.unpack(client.ask(Datagram(good.address, b'y').pack())),
                             Datagram(good.address, b'E:y'))
            self.assertEqual(bad.seen, [])
            del good.seen[:]

    def test_look_ups_keep_order(self):
        """Datagrams to a name wait for its look-up in order; others pass them by."""
        echo = self.echo('127.0.0.1', b'')
        client = self.associate(self.serve())
        for number in range(20):
            client.send(Datagram(Address('localhost', echo.address.port), b'%d' % number).pack())
        numbers = [int(Datagram.unpack(client.receive()).payload) for _ in range(20)]
        self.assertEqual(numbers, sorted(numbers))

    def test_many(self):
        """200 associations at once, each with its own answers."""
        server, echo = self.serve(udp_strict=True), self.echo()
        clients = [self.associate(server) for _ in range(200)]
        for start in range(0, 200, 50):         # as many as the target's buffer is sure to hold
            for number, client in enumerate(clients[start:start + 50]):
                client.send(Datagram(echo.address, b'%d' % number).pack())
            for number, client in enumerate(clients[start:start + 50]):
                self.assertEqual(Datagram.unpack(client.receive()).payload, b'E:%d' % number)
        self.assertTrue(all(client.nothing_comes(0) for client in clients))

    def test_garbage(self):
        """10,000 malformed datagrams from owner and strangers; it serves on, with no descriptor
        more."""
        class Only(socks.Server):
            def authorize(self, client, target, name=None):
                """Whatever the bytes say, nobody else is bothered."""
                if target != echo.address:
                    raise socks.Refused('somebody else')

        server, echo = self.serve(server_class=Only), self.echo()
        client = self.associate(server, 'own')
        stranger = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        valid = Datagram(echo.address, b'x').pack()
        client.ask(valid)
        files, source = descriptors(), random.Random(4)
        for number in range(10000):
            if number % 2:
                data = bytearray(random_bytes(source, source.randrange(40)))
            else:
                data = bytearray(valid)
                data[source.randrange(3)] = source.getrandbits(8)
                data[source.randrange(len(data))] = source.getrandbits(8)
            if len(data) > 3 and data[3] == 3:
                data[3] = 2                     # nor is any name looked up
            client.send(data, stranger if number % 3 == 0 else None)
            if number % 50 == 0:
                time.sleep(0.001)               # what the system drops tests nothing
        while not client.nothing_comes():
            pass
        client.send(hexed('000000017f'))        # ends a sequence of fragments, if there is one
        self.assertEqual(client.ask(valid)[-3:], b'E:x')
        self.assertLessEqual(descriptors(), files)
        client.control.sock.close()
        eventually(lambda: self.lines)
        self.assertRegex(self.lines[-1], r'done, \d+ datagrams? dropped')


@unittest.skipUnless(hasattr(socket, 'SO_REUSEPORT'), 'this system has no SO_REUSEPORT')
class SharedPortTest(DatagramCase):
    """Settings.udp_port.  All clients here have one IP address: they are hard to tell apart."""

    def serve(self, *args, **settings):
        self.port = settings.setdefault('udp_port', unused_port())
        return super().serve(*args, **settings)

    # What is so with a port for each association, too.
    test_vectors = UdpTest.test_vectors
    test_hints = UdpTest.test_hints
    test_owner = UdpTest.test_owner
    test_ends_with_the_connection = UdpTest.test_ends_with_the_connection
    test_another_port_of_the_client = UdpTest.test_another_port_of_the_client
    test_both_families = UdpTest.test_both_families
    test_anybody_may_answer = UdpTest.test_anybody_may_answer
    relay_of = UdpTest.relay_of
    test_many = UdpTest.test_many
    test_idle = UdpTest.test_idle

    def asks(self, client, echo, text):
        """Whether the client gets the answer to a datagram with this text."""
        client.send(Datagram(echo.address, text).pack())
        return not client.nothing_comes(PATIENCE if text == b'yes' else 0.05)

    def test_port(self):
        """Replies have it, with the address to advertise; no association costs a descriptor."""
        server = self.serve(advertise='127.0.0.1')
        before = descriptors()
        clients = [self.associate(server) for _ in range(20)]
        self.assertEqual({client.relay for client in clients}, {('127.0.0.1', self.port)})
        if before:
            self.assertLessEqual(descriptors(), before + 3 * 20)    # TCP's two ends, client.sock

    def test_bursts(self):
        """Of several clients, in turns: all arrive, in order, and answers go where they belong."""
        server, echo = self.serve(), self.echo('127.0.0.1', b'')
        clients = [self.associate(server) for _ in range(3)]
        for number in range(20):        # no more than the target's buffer is sure to hold
            for place, client in enumerate(clients):
                for part in range(1 + place):
                    client.send(Datagram(echo.address, b'%d %d %d' % (place, number, part)).pack())
        for place, client in enumerate(clients):
            texts = [Datagram.unpack(client.receive()).payload for _ in range(20 * (1 + place))]
            self.assertEqual(texts, [b'%d %d %d' % (place, number, part) for number in range(20)
                                     for part in range(1 + place)])
        self.assertTrue(all(client.nothing_comes(0) for client in clients))

    def test_who_gets_the_first_datagram(self):
        """The association that announced its port, else the oldest that has had none."""
        server, echo = self.serve(), self.echo()
        idle = self.associate(server)
        relay = self.relay_in(server)
        announced = self.associate(server, 'own')
        for text in b'first', b'second':
            self.assertEqual(announced.ask(Datagram(echo.address, text).pack())[-len(text):], text)
        self.assertIsNone(relay.owner)
        later = self.associate(server)
        self.assertEqual(later.ask(Datagram(echo.address, b'x').pack())[-3:], b'E:x')
        self.assertEqual(relay.owner, later.sock.getsockname())
        self.assertFalse(relay.admit(('127.0.0.1', 0)))         # not the announced port
        self.assertEqual(idle.ask(Datagram(echo.address, b'x').pack())[-3:], b'E:x')
        with Associate(server) as nobody:       # all have their clients
            stranger = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            nobody.ask(Datagram(echo.address, b'x').pack())
            del echo.seen[:]
            for data in Datagram(echo.address, b'stranger').pack(), b'', b'junk':
                nobody.send(data, stranger)
            nobody.ask(Datagram(echo.address, b'y').pack())
            self.assertEqual(echo.seen, [b'y'])

    def test_announced_ports(self):
        """One takes its association back, for good, but not one that another client uses."""
        server, echo = self.serve(), self.echo()
        data = Datagram(echo.address, b'x').pack()
        client = self.associate(server, 'own')
        stranger = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        client.send(data, stranger)
        relay = self.relay_in(server)
        eventually(lambda: relay.owner)
        far = list(relay.far.values())
        client.ask(data)
        self.assertEqual(relay.owner, client.sock.getsockname())
        self.assertEqual([sock.fileno() for sock in far], [-1])
        rogue = self.associate(server, Address('0.0.0.0', client.sock.getsockname()[1]))
        client.ask(data)
        self.assertEqual(relay.owner, client.sock.getsockname())
        self.assertTrue(rogue.nothing_comes(0))
        client.control.sock.close()
        eventually(lambda: len(server.clients) == 1)
        self.assertEqual(client.ask(data)[-3:], b'E:x')         # it is for the other one now

    def test_late_datagrams(self):
        """Those of an association that has ended are not the first ones of another, unless that
        has announced their port."""
        server, echo = self.serve(), self.echo()
        data = Datagram(echo.address, b'x').pack()
        first = self.associate(server)
        first.ask(data)
        first.control.sock.close()
        eventually(lambda: not server.clients)
        second = self.associate(server)
        first.send(data)
        second.ask(data)
        self.assertEqual(self.relay_in(server).owner, second.sock.getsockname())
        self.assertTrue(first.nothing_comes(0))
        self.associate(server, Address('0.0.0.0', first.sock.getsockname()[1]))
        self.assertEqual(first.ask(data)[-3:], b'E:x')

    def test_users_with_one_address(self):
        """What might be of either is dropped; afterwards each has its own."""
        users = {name: b'secret' for name in (b'alice', b'bob')}
        server, echo = self.serve(users=users), self.echo()
        alice, bob = [self.associate(server, Address('0.0.0.0', 0), Credentials(*user))
                      for user in users.items()]
        for client in alice, bob:
            self.assertFalse(self.asks(client, echo, b'no'))
        self.assertEqual(echo.seen, [])
        bob.control.sock.close()
        eventually(lambda: len(server.clients) == 1)
        self.assertTrue(self.asks(alice, echo, b'yes'))
        bob = self.associate(server, Address('0.0.0.0', 0), Credentials(b'bob', b'secret'))
        self.assertTrue(self.asks(bob, echo, b'yes'))
        self.assertEqual({item.client.user: item.up.count for item in list(server.loop.items)
                          if isinstance(item, socks.UdpRelay)}, {'alice': 1, 'bob': 1})
        port = Address('0.0.0.0', alice.sock.getsockname()[1])
        self.associate(server, port, Credentials(b'bob', b'secret'))
        self.assertTrue(self.asks(alice, echo, b'yes'))
        alice.control.sock.close()
        eventually(lambda: len(server.clients) == 2)
        self.assertTrue(self.asks(alice, echo, b'yes'))

    def test_silent_clients(self):
        """One with an association of the same address beside it keeps it; else the next port gets
        it, but no answer to what was sent before."""
        class Elsewhere(socks.Handler):
            def do_UDP_ASSOCIATE(self, request):
                relay = yield from super().do_UDP_ASSOCIATE(request)
                relay.is_here = False
                return relay

        self.change(socks.UdpRelay, SILENCE=0.05)
        server, echo = self.serve(Elsewhere), self.echo()
        client, other = self.associate(server), self.associate(server)
        data = Datagram(echo.address, b'x').pack()
        client.ask(data)
        relay = self.relay_in(server)
        other.ask(data)
        stranger = self.associate(self.serve(udp_port=0))
        stranger.relay = client.relay
        eventually(lambda: not relay.owner)
        stranger.send(data)
        self.assertTrue(stranger.nothing_comes(0.05))
        self.assertEqual(client.ask(data)[-3:], b'E:x')
        other.control.sock.close()
        eventually(lambda: len(server.clients) == 1)
        far = list(relay.far.values())
        eventually(lambda: not relay.owner)
        self.assertEqual(stranger.ask(data)[-3:], b'E:x')
        self.assertEqual([sock.fileno() for sock in far], [-1])

    @staticmethod
    def ask_from_the_same_host(client, data):
        """The answer to data from the address that the client's connection has."""
        client.sock.close()
        with socket.socket(client.sock.family, socket.SOCK_DGRAM) as client.sock:
            client.sock.bind((client.control.sock.getsockname()[0], 0))
            client.sock.settimeout(PATIENCE)
            return client.ask(data)

    def test_all_addresses(self):
        """Answers leave from the address that the client has connected to."""
        echo = self.echo()
        data = Datagram(echo.address, b'x').pack()
        for host in ('0.0.0.0', '::')[:1 + HAS_IPV6]:
            server = self.serve(host=host, open=True)
            hosts = ('127.0.0.1', '127.0.0.2', '::1')[:2 + (host == '::')]
            for own in filter(socks.is_ours, hosts):
                there = Address(own, server.server_address.port)
                for client in [self.associate(argparse.Namespace(server_address=there))
                               for _ in range(2)]:
                    self.assertEqual(client.relay, (own, self.port))
                    self.assertEqual(self.ask_from_the_same_host(client, data)[-3:], b'E:x')
                    client.control.sock.close()
                hosts_held = {address.host for address in server.addresses}
                eventually(lambda: {key.host for key in server.shared_ports._ports} == hosts_held)

    def test_port_in_use(self):
        """By another program, on any of the addresses, with whatever option."""
        port = unused_port()
        for host, option in (('127.0.0.1', None), ('0.0.0.0', None),
                             ('127.0.0.1', socket.SO_REUSEADDR)):
            with self.subTest(host), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                if option:
                    sock.setsockopt(socket.SOL_SOCKET, option, 1)
                sock.bind((host, port))
                with self.assertRaisesRegex(OSError, f'--udp-port: cannot listen on 127.0.0.1:'
                                                     f'{port}: Address already in use'):
                    self.serve(udp_port=port)
        server = self.serve(udp_port=port, host='0.0.0.0', open=True)
        for host in '127.0.0.1', '0.0.0.0':     # nor may any share it
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with self.assertRaises(OSError):
                    sock.bind((host, port))
        server.stop()
        self.serve(udp_port=port)

    def test_without_the_option_of_sockets(self):
        """As on Windows: a clear refusal."""
        self.addCleanup(setattr, socket, 'SO_REUSEPORT', socket.SO_REUSEPORT)
        del socket.SO_REUSEPORT
        with self.assertRaisesRegex(ValueError, '--udp-port: not possible on this system'):
            self.serve()

    def test_reconfigure(self):
        """Associations go on at the old port, which closes with the last of them."""
        server, echo = self.serve(), self.echo()
        first, old = self.associate(server), self.port
        data = Datagram(echo.address, b'x').pack()
        first.ask(data)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(('127.0.0.1', 0))
            with self.assertRaisesRegex(OSError, 'already in use'):
                server.reconfigure(Settings(udp_port=sock.getsockname()[1]))
        self.assertEqual(self.associate(server).relay.port, old)
        new = unused_port()
        server.reconfigure(Settings(udp_port=new))
        second = self.associate(server)
        self.assertEqual(second.relay.port, new)
        server.reconfigure(Settings())
        self.assertNotIn(self.associate(server).relay.port, (old, new))
        for client in first, second:
            self.assertEqual(client.ask(data)[-3:], b'E:x')
        second.control.sock.close()
        eventually(lambda: [*server.shared_ports._ports] == [('127.0.0.1', old)])

    def test_not_a_target(self):
        """For datagrams; TCP has another service there, perhaps."""
        for host, advertise in ('127.0.0.1', ()), ('0.0.0.0', '203.0.113.1'):
            server = self.serve(host=host, open=True, advertise=advertise,
                                rules=['allow to 0.0.0.0/0 127.0.0.0/8'])
            client = socks.Session(server, Address('192.0.2.1', 5))
            for target in ('127.0.0.1', *filter(None, [advertise])):
                client.command = socks.Command.UDP_ASSOCIATE
                server.authorize(client, Address(target, 1))
                with self.assertRaisesRegex(socks.Refused, 'the proxy itself'):
                    server.authorize(client, Address(target, self.port))
                client.command = socks.Command.CONNECT
                server.authorize(client, Address(target, self.port))


class UdpInTcpTest(DatagramCase):
    """Datagrams in the client's connection, after command 05."""

    def setUp(self):
        socks.background_loop()         # its thread stays
        super().setUp()

    def test_ways(self):
        self.check_way(self.stream(self.serve()))
        server = self.serve(tls=server_context())
        self.check_way(self.stream(server, lambda sock: client_context().wrap_socket(
            sock, server_hostname='localhost')))

    def test_reply(self):
        """It repeats the address of the request, as hev-socks5-server's does."""
        server = self.serve()
        for request, reply in (('05050001 00000000 0000', '05000001 00000000 0000'),
                               ('05050004 00*16 0000', '05000004 00*16 0000'),
                               ('05050001 7f000001 0009', '05000001 7f000001 0009'),
                               ('05050003 0161 0009', '05000001 00000000 0000')):
            with Peer(server.server_address) as peer:
                peer.send(hexed('050100' + request))
                self.assertEqual(peer.read(2 + len(hexed(reply))), hexed('0500' + reply))

    def test_message_by_message(self):
        """However they are split, or come together; the first with the request."""
        echo = self.echo()
        messages = [StreamAssociate.message(Datagram(echo.address, b'%d' % number).pack())
                    for number in range(200)]
        client = self.stream(self.serve(), None, b''.join(messages[:3]))
        client.control.send(b''.join(messages[3:6]), 1)
        client.control.send(b''.join(messages[6:]))
        self.assertEqual([Datagram.unpack(client.receive()).payload for _ in messages],
                         [b'E:%d' % number for number in range(200)])

    def test_the_rest_of_a_turn(self):
        """Messages that are read, but for which no time is left, need no further one to come."""
        class Slow(socks.Server):
            def authorize(self, client, target, name=None):
                end = time.monotonic() + 0.002
                while time.monotonic() < end:
                    pass

        client = self.stream(self.serve(server_class=Slow))
        echoes = [self.echo() for _ in range(4)]
        client.control.send(b''.join(StreamAssociate.message(Datagram(echo.address, b'').pack())
                                     for echo in echoes))
        self.assertEqual({Datagram.unpack(client.receive()).address for _ in echoes},
                         {echo.address for echo in echoes})

    def test_malformed(self):
        """The stream has no further messages then; what came before is relayed."""
        echo, silent = self.echo(), self.enter(socks.bound_udp(Address('127.0.0.1', 0)))
        valid = StreamAssociate.message(Datagram(echo.address, b'x').pack())
        unanswered = StreamAssociate.message(
            Datagram(Address(*silent.getsockname()), b'x').pack())
        for data, outcome in (
                ('0001 0a 02', 'client: malformed message: address type 0x02, expected 0x01, '),
                ('0001 0b 01', 'client: malformed message: HDRLEN 11, expected 10'),
                ('0001 00 03 01', 'client: malformed message: HDRLEN 0, expected 8'),
                ('0001 0a 01 7f', 'client: the end of a message is missing'), ('', 'done')):
            with self.subTest(data):
                server = self.serve()
                client = self.stream(server)
                client.control.send(valid)
                self.assertEqual(client.receive()[-3:], b'E:x')
                client.control.send(unanswered + hexed(data) + b'\0' * (outcome[8:9] == 'm'))
                client.control.finish()
                self.assertEqual(client.control.rest(), b'')
                line = eventually(lambda: self.lines)[0]
                self.assertRegex(line, f' UDP_IN_TCP 2 targets, 2 datagrams up, 1 down: {outcome}')
                eventually(lambda: not server.clients)

    def test_reset(self):
        client = self.stream(self.serve())
        client.control.reset()
        self.assertRegex(eventually(lambda: self.lines)[0], 'UDP_IN_TCP .*: client: .*reset')

    def test_idle(self):
        client = self.stream(self.serve(udp_timeout=0.2))
        self.assertEqual(client.control.rest(), b'')
        self.assertIn(': idle, ', eventually(lambda: self.lines)[0])

    def test_client_that_does_not_read(self):
        """What its connection does not take is dropped, and none is cut; memory is bounded."""
        echo = self.echo('127.0.0.1', b'')
        server = self.serve()
        client = self.stream(server)
        relay = self.relay_in(server)
        relay.near._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        payload = bytes(60000)
        while not relay.dropped:
            answers = relay.down.count + relay.dropped
            client.send(Datagram(echo.address, payload).pack())
            eventually(lambda: relay.down.count + relay.dropped > answers)
        self.assertLessEqual(relay.near._size, relay.near.ROOM)
        for _ in range(relay.down.count):
            self.assertEqual(Datagram.unpack(client.receive()), Datagram(echo.address, payload))
        self.assertEqual(client.ask(Datagram(echo.address, b'x').pack())[-1:], b'x')
        client.control.finish()
        self.assertRegex(eventually(lambda: self.lines)[0], ' datagrams? dropped')

    def test_many_clients_that_do_not_read(self):
        """Little waits for each of them when much waits for others."""
        self.change(socks.Pipe, HELD=1 << 17)
        server, target = self.serve(), self.enter(socks.bound_udp(Address('127.0.0.1', 0)))
        data = Datagram(Address(*target.getsockname()), b'x').pack()
        clients, relays = [], []
        for _ in range(5):
            clients.append(self.stream(server))
            relay = eventually(lambda: [item for item in list(server.loop.items) if isinstance(
                item, socks.UdpRelay) and item not in relays])[0]
            relay.near._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            relays.append(relay)
            clients[-1].sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            clients[-1].send(data)
            self.assertTrue(ready([target], [], PATIENCE))
            source = target.recvfrom(10)[1]
            while not relay.dropped:
                number = relay.down.count + relay.dropped
                target.sendto(bytes(8000), source)
                eventually(lambda: relay.down.count + relay.dropped > number)
        self.assertLess(sum(relay.near._size for relay in relays), 2 * relay.near.ROOM)
        for client in clients:
            client.control.reset()
        eventually(lambda: not server.clients)
        self.assertEqual(server.loop.held, 0)

    def test_rules(self):
        """They know it as UDP, as does who asks for the command."""
        echo, asked = self.echo(), []

        class Asking(socks.Server):
            def authorize(self, client, target, name=None):
                asked.append(client.command)
                super().authorize(client, target, name)

        for rules, reply in (('deny udp to *|allow to *', 2), ('allow connect to *', 2),
                             ('allow udp to 127.0.0.1', 0)):
            rules = tuple(socks.parse_rule(rule, 'here') for rule in rules.split('|'))
            server = self.serve(server_class=Asking, rules=rules)
            self.assertEqual(self.stream(server).response.reply, reply)
        client = self.stream(server)
        client.send(Datagram(Address('127.0.0.2', echo.address.port), b'denied').pack())
        self.assertEqual(client.ask(Datagram(echo.address, b'x').pack())[-3:], b'E:x')
        self.assertEqual(asked, [socks.Command.UDP_ASSOCIATE] * 2)

    def test_not_in_socks4(self):
        peer = self.peer(self.serve().server_address)
        self.assertEqual(peer.ask(Request4(5, Address('127.0.0.1', 1)), Response4), Response4(0x5b))


class Socks6Test(DatagramCase):

    def ask(self, server, request):
        """A client that has sent a request, and more."""
        peer = self.peer(server.server_address)
        peer.send(hexed(request))
        return peer

    def answers(self, peer):
        return Verdict6.unpack(peer.read), Response6.unpack(peer.read)

    def test_off(self):
        """Without the setting, it is a wrong first byte; with it, others are as before."""
        server = self.serve()
        self.assertEqual(self.ask(server, '0601 0000 0050 00 01 7f000001').rest(), b'')
        self.assertIn(' - - - -: refused: SOCKS6, which needs --socks6, expected SOCKS or HTTP, ',
                      eventually(lambda: self.lines)[0])
        server = self.serve(socks6=True)
        self.assertEqual(self.ask(server, '07').rest(), b'')
        # NOOP is no command of others.
        self.assertEqual(self.ask(server, '0400 0000 00000000 00').rest(), hexed('005b 00*6'))
        self.assertEqual(self.ask(server, '050100 05000001 00000000 0000').rest(),
                         hexed('0500 05070001 00000000 0000'))

    def test_commands_of_others(self):
        server = self.serve(socks6=True, tor_extensions=True)
        for command in '05', 'f0', 'f1', '08':
            peer = self.ask(server, f'06{command} 0000 0000 00 01 7f000001')
            self.assertEqual(peer.rest(), hexed('0600 0000 0607 0000 0000 00 01 00000000'))

    def test_most_options(self):
        """5,120 in 20,480 bytes; the limits of the connection see to more of them."""
        server, origin = self.serve(socks6=True), self.origin(echo)
        request = Request6(1, Address('127.0.0.1', origin.port), (Option(9, b''),) * 5120)
        peer = self.peer(server.server_address)
        peer.send(request.pack() + b'data')
        self.assertEqual([answer[0] for answer in self.answers(peer)], [0, 0])
        self.assertEqual(peer.read(4), b'data')

    def test_mutations(self):
        """Options malformed in every field: an error, or a request; never more than is there."""
        chance = random.Random(6)
        valid = [hexed(data) for _, message, data in MESSAGES if isinstance(message, Request6)
                 and len(message.options) < 9]
        for _ in range(3000):
            data = bytearray(chance.choice(valid))
            for _ in range(chance.randrange(1, 4)):
                place = chance.randrange(2, len(data))
                data[place] = chance.choice((0, 1, 2, 3, 4, 8, 20, 80, 255, chance.getrandbits(8)))
            with contextlib.suppress(EOFError, ProtocolError):
                request = Request6.unpack(socks.reader(bytes(data))[0])
                self.assertLess(len(request.options), len(data))
                request.credentials(), request.methods()

    def test_mutations_of_requests(self):
        """The same to a server: it answers, or waits for more, and nothing is left."""
        chance, origin = random.Random(60), self.origin(echo)
        servers = [self.serve(socks6=True, **settings) for settings in (
            {}, {'users': USERS, 'login_delay': 0})]
        valid = [hexed(f'06{command:02x} {options} {origin.port:04x} 00 01 7f000001 {more}')
                 for command in (0, 1, 2) for options, more in (
                     ('0000', ''), ('0014', BOB_6), ('0010', '0002 0008 0004 02 00 0001 0008 '
                                                     '81 03 20 00'))]
        for _ in range(60):
            peers = []
            for _ in range(5):
                data = bytearray(chance.choice(valid))
                for _ in range(chance.randrange(4)):
                    data[chance.randrange(1, len(data))] = chance.choice((0, 1, 2, 4, 8, 20, 255))
                peers.append(Peer(chance.choice(servers).server_address))
                peers[-1].send(bytes(data) + b'more')
                peers[-1].finish()
            for peer in peers:
                with peer, contextlib.suppress(ConnectionError):
                    peer.rest()
        eventually(lambda: not any(server.clients for server in servers))

    def test_first_data(self):
        """It is the target's once, in order, and only after CONNECT has succeeded."""
        origin, server = self.origin(), self.serve(socks6=True, users=USERS, login_delay=0.02)
        data = bytes(range(256)) * 64           # 16 KiB: the most that may precede credentials
        start = '0601 00{:02x} %04x 00 01 7f000001' % origin.port
        for credentials, verdict in (('01 03 626f62 06 736563726574', 0),
                                     ('01 03 626f62 06 626164212121', 1)):
            peer = self.ask(server, start.format(8) + '0002 0008 4000 02 00' + data.hex()
                            + credentials + b'and more'.hex())
            self.assertEqual(peer.read(14), hexed('0601 0008 0003 0008 02 000000 01')
                             + bytes((verdict,)))
            self.assertEqual(Verdict6.unpack(peer.read), Verdict6(verdict))
            if not verdict:
                self.assertEqual(Response6.unpack(peer.read).reply, 0)
                far = self.enter(eventually(lambda: origin.peers and origin.peers.pop()))
                self.assertEqual(far.read(len(data) + 8), data + b'and more')
        peer = self.ask(server, start.format(20) + BOB_6.replace('736563', '736564') + data.hex())
        self.assertEqual(Verdict6.unpack(peer.read).status, 1)
        self.assertEqual(peer.rest(), b'')
        self.assertEqual(origin.peers, [])

    def test_a_flood_during_the_login(self):
        """What comes while a costly hash is computed waits in the system, and is kept in order."""
        origin, surplus = self.origin(), []

        class Handler(socks.Handler):
            def do_CONNECT(self, request):
                surplus.append(len(self.stream.surplus))
                return (yield from super().do_CONNECT(request))

        server = self.serve(Handler, socks6=True, users={
            b'bob': socks.Hashed(socks.Hashed.make(b'secret'))})
        peer = self.peer(server.server_address)
        flight = hexed('0601 0014 %04x 00 01 7f000001' % origin.port + BOB_6)
        sending = Background(lambda: peer.send(flight + bytes(1 << 20) + b'end'))
        self.assertEqual([answer[0] for answer in self.answers(peer)], [0, 0])
        far = eventually(lambda: origin.peers and origin.peers[0])
        self.assertEqual(far.read((1 << 20) + 3), bytes(1 << 20) + b'end')
        sending.result()
        self.assertLess(surplus[0], 1 << 14)

    def test_guesses(self):
        """They are counted with those of SOCKS5, one for each request."""
        server = self.serve(socks6=True, users=USERS, login_delay=0)
        wrong = '0600 0014 0000 00 01 00000000' + BOB_6.replace('736563', '736564')
        for _ in range(socks.Failures.LIMIT):
            self.assertEqual(Verdict6.unpack(self.ask(server, wrong).read).status, 1)
        right = self.peer(server.server_address)
        right.send(hexed('050102 0103626f6206736563726574'))
        self.assertEqual(right.rest(), hexed('0502 0101'))
        self.assertEqual(Verdict6.unpack(self.ask(
            server, '0600 0014 0000 00 01 00000000' + BOB_6).read), Verdict6(1, (
                Option(4, b'\2\1\1\0'),)))

    def test_log_and_rules(self):
        origin = self.origin(echo)
        server = self.serve(socks6=True, users=USERS, rules=(
            'deny bind to *', f'allow to 127.0.0.1 {origin.port}'))
        for command, port, reply, line in (
                (1, origin.port, 0, f' bob SOCKS6 CONNECT 127.0.0.1:{origin.port}: done, '),
                (1, 9, 2, ' bob SOCKS6 CONNECT 127.0.0.1:9: refused: '),
                (2, 0, 2, ' bob SOCKS6 BIND 0.0.0.0:0: refused: '),
                (2, 9, 2, ' bob SOCKS6 - -: refused: BIND at 127.0.0.1:9, expected zeros, '),
                (9, 0, 7, ' bob SOCKS6 - -: refused: command 0x09 is not supported')):
            peer = self.ask(server, f'06{command:02x} 0014 {port:04x} 00 01 7f000001' + BOB_6)
            self.assertEqual([answer[0] for answer in self.answers(peer)], [0, reply])
            peer.finish()
            peer.rest()
            self.assertIn(line, eventually(lambda: self.lines and self.lines.pop(0)))
        self.ask(server, '0600 0014 0000 00 01 00000000' + BOB_6).rest()
        self.assertIn(' bob SOCKS6 NOOP -: done, ', eventually(lambda: self.lines)[0])

    def test_stack_options(self):
        """Those of the target's socket are set and answered, others ignored."""
        seen = []

        class Handler(socks.Handler):
            def join(self, target, bnd):
                seen.append([target.getsockopt(socket.IPPROTO_IP, option)
                             for option in (socket.IP_TOS, socket.IP_TTL)])
                return super().join(target, bnd)

        origin, server = self.origin(echo), self.serve(Handler, socks6=True)
        options = {'c1 01 10 00': '81 01 10 00', '81 03 21 00': '81 03 21 00',
                   '81 02 01 00': '81 02 02 00', '41 01 08 00': '', '84 02 02 00': '',
                   '85 01 02 00': '', '81 04 02 00': '81 04 02 00'}
        if sys.platform != 'linux':
            del options['81 04 02 00']
        for address, name in (('00 01 7f000001', False),
                              ('00 03 0b 6c6f63616c686f7374 0000', True)):
            peer = self.ask(server, '0601 %04x %04x' % (8 * len(options), origin.port) + address
                            + ''.join('0001 0008' + option for option in options))
            expected = {hexed(answer) for answer in options.values()
                        if answer and (name or answer != '81 02 02 00')}
            verdict, response = self.answers(peer)
            self.assertEqual({data for kind, data in response.options if kind == 1}, expected)
            self.assertEqual(seen.pop(), [16, 33])
        wrong = ''.join(f'0001 0008 81 {code} 00 00' for code in ('03', '04', 'ff')) + '0001 0004'
        peer = self.ask(server, '0601 001c %04x 00 01 7f000001' % origin.port + wrong)
        verdict, response = self.answers(peer)
        self.assertEqual((verdict, response.reply), (Verdict6(0), 0))
        self.assertNotIn(b'\x81\3\0\0', [data for _, data in response.options])

    def test_bind(self):
        """The address is the one to listen at; the second reply names the peer."""
        server = self.serve(socks6=True, bind_timeout=PATIENCE)
        for wanted in ('0000 00 01 00000000', '0000 00 01 7f000001', '0000 00 04 00*16'):
            peer = self.ask(server, '0602 0000' + wanted)
            verdict, first = self.answers(peer)
            self.assertEqual((verdict, first.reply, first.address.host),
                             (Verdict6(0), 0, '127.0.0.1'))
            target = self.peer(first.address, ('127.0.0.2', 0) if sys.platform == 'linux' else None)
            self.assertEqual(Response6.unpack(peer.read),
                             Response6(0, Address(*target.sock.getsockname())))
            target.send(b'down')
            self.assertEqual(peer.read(4), b'down')
        for wanted in '0000 00 01 7f000009', '0000 00 03 03 612e62', '0009 00 01 00000000':
            self.assertEqual(self.answers(self.ask(server, '0602 0000' + wanted))[1].reply, 2)

    def test_bind_in_vain(self):
        peer = self.ask(self.serve(socks6=True, bind_timeout=0.1), '0602 0000 0000 00 01 00000000')
        self.assertEqual(self.answers(peer)[1].reply, 0)
        self.assertEqual(Response6.unpack(peer.read), Response6(9))

    def test_switched_off_meanwhile(self):
        server = self.serve(socks6=True)
        peer = self.ask(server, '0601')
        eventually(lambda: server.clients and server.clients[0].protocol == 'SOCKS6')
        server.reconfigure(Settings())
        peer.send(hexed('0000 0050 00 01 7f000001'))
        self.assertEqual(peer.rest(), hexed('0600 0000 0602 0000 0000 00 01 00000000'))

    # UDP

    def associate(self, *args, **options):
        return self.enter(Associate6(*args, **options))

    def test_ways(self):
        server = self.serve(socks6=True)
        for by_udp, largest in ((False, 65497), (True, 65487)):
            self.check_way(self.associate(server, by_udp), largest)

    def test_datagrams_inside_tls(self):
        """They travel in the connection; there is no port beside it."""
        server = self.serve(socks6=True, tls=server_context())
        client = self.associate(server, wrap=lambda sock: client_context().wrap_socket(
            sock, server_hostname='localhost'))
        self.assertEqual(client.response.address, socks.UNSPECIFIED)
        self.check_way(client)

    @unittest.skipUnless(hasattr(socket, 'SO_REUSEPORT'), 'there is no SO_REUSEPORT here')
    def test_datagrams_beside_a_shared_port(self):
        """That port is for SOCKS5 only."""
        client = self.associate(self.serve(socks6=True, udp_port=unused_port()))
        self.assertEqual(client.response.address, socks.UNSPECIFIED)
        self.check_way(client)

    def test_the_first_way_stays(self):
        """What comes another way is dropped, as is what has another id."""
        echo, server = self.echo(), self.serve(socks6=True)
        client = self.associate(server, True)
        valid = Datagram(echo.address, b'x').pack()
        message = client.message(valid)
        for wrong in (b'', b'\6\3', message[:-1], message[:4] + bytes(8) + message[12:],
                      b'\5' + message[1:], b'\6\4' + message[2:], message[:15]):
            client.sock.send(wrong)
        self.assertTrue(client.nothing_comes(0.05))
        client.sock.send(message + b'padding')
        self.assertEqual(client.receive()[-3:], b'E:x')
        client.control.send(message)            # by the connection
        other = self.enter(socket.socket(client.sock.family, socket.SOCK_DGRAM))
        other.sendto(message, client.response.address)
        eventually(lambda: self.relay_in(server).dropped == 8)
        self.assertEqual(client.ask(valid)[-3:], b'E:x')
        self.assertEqual(echo.seen, [b'x'] * 2)

    def test_the_port_is_closed(self):
        """As soon as the first datagram has come in the connection."""
        echo, server = self.echo(), self.serve(socks6=True)
        client = self.associate(server)
        self.assertEqual(client.ask(Datagram(echo.address, b'x').pack())[-3:], b'E:x')
        self.assertIsNone(self.relay_in(server).port)
        client.control.send(hexed('0603 0000 00*8'))        # too short to be a message
        self.assertEqual(client.control.rest(), b'')
        self.assertIn('SOCKS6 UDP_ASSOCIATE 1 target, 1 datagram up, 1 down: client: malformed '
                      'message: SOCKS6 message of 0 bytes', eventually(lambda: self.lines)[0])

    def test_no_target(self):
        """Without payload, zeros only decide the way."""
        for by_udp in (False, True):
            server = self.serve(socks6=True)
            client = self.associate(server, by_udp)
            client.send(hexed('000000 01 00000000 0000'))
            self.assertEqual(client.control.read(12), hexed('0602 000c') + client.id)
            client.control.finish()
            self.assertIn(' 0 targets, 0 datagrams up, 0 down: done, 0 ',
                          eventually(lambda: self.lines)[0])


class ReassemblyTest(unittest.TestCase):

    def test_time(self):
        """After PATIENCE a fragment continues nothing; a first one begins anew."""
        queue, address = socks.Reassembly(), Address('1.2.3.4', 5)
        self.assertIsNone(queue.add(Datagram(address, b'a', 1), 100.0))
        self.assertIsNone(queue.add(Datagram(address, b'b', 0x82), 100.0 + queue.PATIENCE + 1))
        self.assertIsNone(queue.add(Datagram(address, b'a', 1), 200.0))
        self.assertEqual(queue.add(Datagram(address, b'b', 0x82), 205.0), Datagram(address, b'ab'))

    def test_size(self):
        """At most what a datagram can carry; then the rest is dropped too."""
        queue, address = socks.Reassembly(), Address('1.2.3.4', 5)
        for number in range(1, 120):
            self.assertIsNone(queue.add(Datagram(address, bytes(1000), number), 0.0))
        self.assertIsNone(queue.add(Datagram(address, b'', 0x80 | 120), 0.0))
        for number in range(1, 127):
            queue.add(Datagram(address, bytes([number]), number), 0.0)
        whole = queue.add(Datagram(address, b'!', 0xff), 0.0)
        self.assertEqual(whole.payload, bytes(range(1, 127)) + b'!')


# --------------------------------------------------------------------------------- Tor's extensions

TOR = [
    ('S4-22', '04f000000000000100312e322e332e3400', '005a000001020304', True),
    ('T-01', '050100 / 05f0000307312e322e332e340000', '0500 / 05000001010203040000', True),
    ('T-02', '050100 / 05f00001010203040000', '0500 / 05000001010203040000', True),
    ('T-03', '050100 / 05f0000420010db80000000000000000000000010000',
     '0500 / 0500000420010db80000000000000000000000010000', True),
    ('T-04', '050100 / 05f00003096c6f63616c686f7374002a', '0500 / 050000017f0000010000', True),
    ('T-05', '050100 / 05f100017f0000010000', '0500 / 05000003096c6f63616c686f73740000', True),
    ('T-06', '050100 / 05f1000303612e620000', '0500 / 05080001............', True),
    ('no such name', '050100 / 05f000030a6e6f2e696e76616c69640000', '0500 / 05040001............',
     True),
    ('F1 in SOCKS4', '04f100007f00000100', '005b............', True),
]


class TorTest(VectorCase):

    def test_vectors(self):
        self.check(TOR, self.serve(tor_extensions=True))

    def test_off(self):
        """The log tells the option that switches a command on, if there is one."""
        server, chained = self.serve(), self.serve(upstream='socks5h://127.0.0.1:9')
        for server, text, why in (
                (server, '050100 05f00003016100 00', 'RESOLVE is not switched on (--tor-ext'),
                (server, '050100 05f100017f0000010000', 'RESOLVE_PTR is not switched on (--tor-ex'),
                (server, '04f0 0000 00000001 00 6100', 'RESOLVE is not switched on (--tor-ext'),
                (server, '04f1 0000 7f000001 00', 'RESOLVE_PTR is not supported,'),
                (server, '0403 0001 01020304 00', 'UDP_ASSOCIATE is not supported,'),
                (server, '050100 05330001010101010001', 'command 0x33 is not supported,'),
                (chained, '050100 05020001010203040001', 'BIND is not supported through another '
                                                         'proxy (-x),'),
                (server, '0d', 'a PROXY header, which needs --proxy-protocol, expected SOCKS or'),
                (server, '16', 'TLS, which needs --tls-cert, expected SOCKS or HTTP,'),
                (server, '7f', 'first byte 0x7f, expected SOCKS or HTTP,')):
            with self.subTest(text), Peer(server.server_address) as peer:
                peer.send(hexed(text))
                peer.rest()
                self.assertIn(f' - -: refused: {why}', eventually(lambda: self.lines)[0])
            del self.lines[:]


# --------------------------------------------------------------------------------------- lifecycle

class LifecycleTest(Case):

    def test_calls(self):
        """A connection takes so many calls of Python functions in the loop, those of the log
        included: they are most of what it costs."""
        calls, rounds, origin = 0, 20, self.origin(echo)

        def count(frame, event, _):
            nonlocal calls
            calls += event == 'call'

        threading.setprofile(count)
        self.addCleanup(threading.setprofile, None)
        server = self.serve()           # the loop's thread is the only one to start now
        threading.setprofile(None)
        for number in range(1, rounds + 1):
            with Peer(server.server_address) as peer:
                peer.connect('127.0.0.1', origin.port)
                peer.send(b'x')
                peer.read(1)
            eventually(lambda: len(self.lines) == number)
        self.assertLess(calls / rounds, 175)

    @needs_ipv6
    def test_addresses(self):
        """Several listeners; a port 0 is the same port on all of them."""
        with socks.Server([('127.0.0.1', 0), ('localhost', 0), ('::1', 0)][::2]).start() as server:
            self.assertEqual([a.host for a in server.addresses], ['127.0.0.1', '::1'])
            self.assertEqual(len({a.port for a in server.addresses}), 1)
            for address in server.addresses:
                with Peer(address) as peer:
                    self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))

    @unittest.skipUnless(socket.has_ipv6, 'there is no IPv6 here')
    def test_all_addresses(self):
        """`::` serves both families, as plain IPv4 where a client is, unless IPv4 is given beside.
        """
        if not socks.is_ours('::1'):
            self.skipTest('there is no IPv6 here')
        origin = self.origin(echo)
        for addresses, hosts in (([('::', 0)], ['::', '0.0.0.0']),
                                 ([('::', 0), ('0.0.0.0', 0)], ['::', '0.0.0.0']),
                                 ([('0.0.0.0', 0), ('::', 0)], ['0.0.0.0', '::']),
                                 ([('127.0.0.1', 0), ('::', 0)], ['127.0.0.1', '::']),
                                 ([('::ffff:127.0.0.1', 0)], ['127.0.0.1'])):
            with self.subTest(addresses), socks.Server(addresses, Settings(open=True)) as server:
                self.assertEqual([address.host for address in server.addresses], hosts)
                self.assertEqual(len({address.port for address in server.addresses}), 1)
                server.start()
                with Peer(('127.0.0.1', server.server_address.port)) as peer:
                    reply = peer.connect('127.0.0.1', origin.port)
                    self.assertEqual((reply.reply, reply.address.host), (0, '127.0.0.1'))
                    self.assertIn(peer.sock.getsockname(),
                                  [client.address for client in server.clients])
                with Peer(('127.0.0.1', server.server_address.port)) as peer:
                    address = peer.request(2, Address('127.0.0.1', 0)).address
                    self.assertEqual(address.host, '127.0.0.1')
                if '::' in hosts:
                    peer = self.peer(('::1', server.server_address.port))
                    self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)

    def test_addresses_that_cannot_be(self):
        for address, message in (
                (('127.0.0.1', '8801'), r"'8801'\): expected \(host, port\)"),
                (('127.0.0.1', 65536), r"65536\): expected \(host, port\)"),
                (('127.0.0.1', True), r"True\): expected \(host, port\)"),
                ('127.0.0.1:0', r"'127.0.0.1:0': expected \(host, port\)"),
                ([('127.0.0.1',)], r"\('127.0.0.1',\): expected \(host, port\)"),
                (('*', 0), r"listen on '\*': expected 0.0.0.0 for all IPv4 addresses, :: for"),
                (('', 0), "listen on '': expected 0.0.0.0 for all IPv4 addresses, :: for all")):
            with self.subTest(address), self.assertRaisesRegex(ValueError, message):
                socks.Server(address)

    @unittest.skipUnless(hasattr(os, 'sched_setaffinity'), 'none here')
    def test_processors_that_may_be_used(self):
        before = os.sched_getaffinity(0)
        self.addCleanup(os.sched_setaffinity, 0, before)
        os.sched_setaffinity(0, {min(before)})
        self.assertEqual(socks.worker_count('auto'), 1)

    def test_name(self):
        with socks.Server(('localhost', 0)) as server:
            self.assertIn(server.server_address.host, ('127.0.0.1', '::1'))

    def test_port_in_use(self):
        with socks.Server(('127.0.0.1', 0)) as server:
            with self.assertRaisesRegex(OSError, 'cannot listen on 127.0.0.1:') as caught:
                socks.Server(server.server_address)
            self.assertTrue(caught.exception.errno)

    def test_no_open_proxy(self):
        for host in ('0.0.0.0', '::')[:1 + HAS_IPV6]:
            with self.assertRaisesRegex(ValueError, 'everybody'):
                socks.Server((host, 0))
            socks.Server((host, 0), Settings(open=True)).server_close()
            socks.Server((host, 0), Settings(users=USERS)).server_close()

    def test_serve_again(self):
        """shutdown() ends serve_forever(), which can be called again."""
        with socks.Server(('127.0.0.1', 0)) as server:
            for _ in range(3):
                server.start()
                with Peer(server.server_address) as peer:
                    peer.ask(Greeting(b'\0'), Choice)
                server.shutdown()

    def test_close_twice(self):
        server = socks.Server(('127.0.0.1', 0)).start()
        server.server_close()
        server.server_close()
        with self.assertRaisesRegex(RuntimeError, 'closed'):
            server.start()

    def test_stop(self):
        """It ends all, the listeners too; shutdown() leaves those."""
        server = self.serve()
        peer = self.peer(server.server_address)
        peer.ask(Greeting(b'\0'), Choice)
        server.shutdown()
        self.assertTrue(listens(server.server_address.port))
        server.stop()
        self.assertEqual(peer.rest(), b'')
        self.assertFalse(listens(server.server_address.port))
        server.stop()
        self.assertFalse({'close', 'ready', 'expire'} & set(dir(server)))

    def test_texts_as_settings(self):
        """They stand for what they do on the command line."""
        network = ipaddress.ip_network
        hop = socks.parse_proxy_url('socks5h://h')
        for name, value, expected in (
                ('clients', ['127.0.0.0/8', '::1'], (network('127.0.0.0/8'), network('::1'))),
                ('trusted', '10.0.0.0/8', (network('10.0.0.0/8'),)),
                ('balancers', [network('::1')], (network('::1'),)),
                ('rules', ('deny to *',), socks.Rules([socks.parse_rule('deny to *', 'rule 1')])),
                ('rules', '# none\n\ndeny to *  # x\n', socks.Rules([
                    socks.parse_rule('deny to *', 'rule 3')])),
                ('rules', ['# own\ndeny to a.test', 'allow to *'], socks.Rules([
                    socks.parse_rule('deny to a.test', 'rule 2'),
                    socks.parse_rule('allow to *', 'rule 3')])),
                ('rules', None, None), ('upstream', 'socks5h://h', (hop,)),
                ('upstream', hop, (hop,)), ('upstream', ('socks5h://h', hop), (hop, hop)),
                ('source', '127.0.0.1', ('127.0.0.1',)), ('udp_ports', '5-9', (5, 9)),
                ('udp_ports', [5, 9], (5, 9)), ('udp_port', '0', 0), ('idle_timeout', '2.5', 2.5),
                ('idle_timeout', None, 0), ('max_clients', '7', 7), ('users', {'a': 'b'},
                                                                     {b'a': b'b'})):
            with self.subTest(name, value=value):
                server = self.serve(**{name: value})
                self.assertEqual(getattr(server.settings, name), expected)
                server.reconfigure(Settings(**{name: value}))
                self.assertEqual(getattr(server.settings, name), expected)

    def test_wrong_settings(self):
        """The field is named, when they are given."""
        for name, value in (
                ('clients', ['x']), ('clients', 5), ('clients', [5]), ('trusted', ['10.0.0.1/8']),
                ('rules', ['deny']), ('rules', [3]), ('rules', 3), ('upstream', 'ftp://h'),
                ('upstream', 5), ('upstream', (7, 'h')), ('source', 'localhost'), ('source', 127),
                ('source', ('127.0.0.1', '127.0.0.2')), ('advertise', ['']), ('tls', 'cert.pem'),
                ('udp_ports', 5), ('udp_ports', '9-5'), ('udp_ports', (1, 2, 3)),
                ('udp_port', 65536), ('udp_port', 'x'), ('udp_port', -1),
                ('gssapi', ['clear']), ('max_clients', -1), ('max_clients', 'x'),
                ('max_clients', 2.5), ('idle_timeout', 'soon'), ('idle_timeout', float('nan')),
                ('users', ['bob:secret']), ('users', {'bob': 5}), ('users', {5: 'bob'}),
                ('open', 'no'), ('http', 1), ('ident', None), ('unix_mode', '999'),
                ('unix_mode', 0o1777), ('upstream', [5]), ('udp_ports', 'x'),
                ('tls', ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))):
            with self.subTest(name, value=value):
                with self.assertRaisesRegex(ValueError, f'^Settings.{name}: '):
                    socks.Server(('127.0.0.1', 0), Settings(**{name: value}))
        with self.assertRaisesRegex(TypeError, 'expected Settings'):
            socks.Server(('127.0.0.1', 0), {'users': {'bob': 'secret'}})

    def test_no_password_in_settings(self):
        for upstream in ('socks5h://bob:secret@h', ['socks5h://bob:secret@h'],
                         (socks.parse_proxy_url('socks5h://bob:secret@h'),)):
            self.assertNotIn('secret', repr(Settings(upstream=upstream, users={'a': 'secret'})))

    def test_stop_in_the_loop(self):
        """It is done in another thread."""
        class Stopping(socks.Server):
            def authorize(self, client, target, name=None):
                self.stop()

        server = self.serve(server_class=Stopping)
        with Peer(server.server_address) as peer, contextlib.suppress(ConnectionError):
            peer.begin(1, Address('127.0.0.1', 1))
            peer.rest()
        eventually(lambda: server.loop.closed)

    def test_wrong_addresses(self):
        for address in ('127.0.0.1:0', ('127.0.0.1', '8801'), ('127.0.0.1',), ['127.0.0.1'], 1080,
                        ('127.0.0.1', 65536), ('127.0.0.1', None), [('127.0.0.1', 0), '::1'], None,
                        (b'127.0.0.1', 0), []):
            with self.subTest(address), self.assertRaisesRegex(ValueError, '^server_address: '):
                socks.Server(address)

    def test_no_descriptor_for_a_loop(self):
        """Nothing is left of one that cannot be made."""
        def poller():
            raise OSError(errno.EMFILE, 'none')

        self.change(socks, Poller=poller)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            with self.assertRaises(OSError):
                socks.Loop()
            gc.collect()
        self.assertEqual([str(warning.message) for warning in caught], [])

    def test_start_twice(self):
        server = self.serve()
        with self.assertRaisesRegex(RuntimeError, 'started'):
            server.start()

    def test_settings(self):
        """Users may be text, and passwords are not shown."""
        server = self.serve(users={'bob': 'secret'})
        with Peer(server.server_address) as peer:
            peer.ask(Greeting(b'\2'), Choice)
            self.assertEqual(peer.ask(Credentials(b'bob', b'secret'), Verdict), Verdict(0))
        self.assertNotIn('secret', repr(server.settings))
        with self.assertRaisesRegex(OSError, 'not an address of this host'):
            socks.Server(('127.0.0.1', 0), Settings(source=('203.0.113.1',)))

    def test_max_clients(self):
        """One more client than allowed waits until another one leaves."""
        server = self.serve(max_clients=2)
        first, second = [self.peer(server.server_address) for _ in range(2)]
        for peer in (first, second):
            peer.ask(Greeting(b'\0'), Choice)
        self.assertEqual(second.ask(Request(3, Address('0.0.0.0', 0)), Response).reply, 0)
        third = self.peer(server.server_address)
        third.send(Greeting(b'\0').pack())
        self.assertFalse(ready([third.sock], [], 0.3))
        first.sock.close()
        self.assertEqual(third.read(2), b'\5\0')

    @unittest.skipUnless(socks.ERRORS, 'this system does not tell of resets')
    def test_reset_ends_what_is_under_way(self):
        """Connecting, a look-up, a BIND, the delay of a wrong password."""
        self.slow_names()
        server, silent = self.serve(), self.silent_port()
        with_users = self.serve(users={'bob': 'secret'}, login_delay=60)
        held = self.origin()            # a proxy that says nothing
        chained = self.serve(upstream=(socks.parse_proxy_url(f'socks5h://127.0.0.1:{held.port}'),))
        messages = [('connecting', Request(1, Address('127.0.0.1', silent))),
                    ('chain', Request(1, Address('192.0.2.1', 80))),
                    ('look-up', Request(1, Address('name.slow', 80))),
                    ('BIND', Request(2, Address('127.0.0.1', 0))),
                    ('login', Credentials(b'bob', b'wrong'))]
        for (name, message), early in itertools.product(messages, (b'', b'GET /')):
            with self.subTest(name, early=early):
                serving = {'login': with_users, 'chain': chained}.get(name, server)
                peer = self.peer(serving.server_address)
                peer.ask(Greeting(b'\2' if name == 'login' else b'\0'), Choice)
                peer.send(message.pack())
                client = eventually(lambda: serving.clients)[0]
                eventually(lambda: client.command or serving.failures._since)
                peer.send(early)
                if name == 'BIND':
                    self.assertEqual(Response.unpack(peer.read).reply, 0)
                del self.lines[:]
                peer.reset()
                eventually(lambda: not serving.clients and self.lines)
                self.assertRegex(self.lines[0], 'Connection reset by peer|Broken pipe')
                self.assertNotIn('unexpectedly', self.lines[0])

    def test_half_close_ends_nothing(self):
        """A client may end its direction while its look-up takes time."""
        event, server = self.slow_names(), self.serve()
        peer = self.peer(server.server_address)
        peer.begin(1, Address('name.slow', 80))
        peer.finish()
        eventually(lambda: [client for client in server.clients if client.command])
        event.set()
        self.assertEqual(Response.unpack(peer.read).reply, Reply.GENERAL_FAILURE)

    def test_half_open_handshakes(self):
        """300 of them do not slow a normal client."""
        server, origin = self.serve(), self.origin(echo)
        for _ in range(300):
            self.peer(server.server_address).send(b'\5')
        eventually(lambda: len(server.clients) == 300)
        started = time.monotonic()
        peer = self.peer(server.server_address)
        self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)
        self.assertLess(time.monotonic() - started, 1)

    def test_aborts(self):
        """500 aborted handshakes and 500 aborted tunnels leave nothing behind."""
        server, origin = self.serve(), self.origin()
        threads, files = threading.active_count(), descriptors()
        source = random.Random(1)
        handshake = hexed('050100 050100017f000001{port}', port=origin.port)
        for length in [source.randrange(len(handshake)) for _ in range(500)] + [13] * 500:
            peer = Peer(server.server_address)
            peer.send(handshake[:length])
            if length == 13:
                peer.read(12)
            peer.reset()
            while origin.peers:
                origin.peers.pop().sock.close()
        eventually(lambda: not server.clients)
        eventually(lambda: (threading.active_count(), descriptors()) <= (threads + 20, files))

    def test_garbage(self):
        """2,000 random handshakes and 2,000 damaged ones; then a normal client is served."""
        def destinations(client, address, *args):
            """Whatever the bytes say, nobody else is bothered."""
            if socks.canonical(address) != Address('127.0.0.1', origin.port):
                raise socks.Refused('somebody else')
            return usual(client, address, *args)

        server, origin = self.serve(), self.origin(echo)
        usual, server.destinations = server.destinations, destinations
        source = random.Random(2)
        valid = [hexed(sends.replace('/', ''), port=origin.port, refused=1, silent=1, port2=1)
                 for _, sends, _, _ in NO_AUTHENTICATION if 'silent' not in sends]
        for number in range(4000):
            if number % 2:
                data = random_bytes(source, source.randrange(40))
                data = source.choice((b'', b'\4', b'\5', b'\5\1\0\5')) + data
            else:
                data = bytearray(source.choice(valid)[:300])
                for _ in range(source.randrange(1, 4)):
                    data[source.randrange(len(data))] = source.getrandbits(8)
            with Peer(server.server_address) as peer, contextlib.suppress(OSError):
                peer.send(data)
                peer.finish()
        eventually(lambda: not server.clients)
        peer = self.peer(server.server_address)
        self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)

    def test_no_thread_to_be_had(self):
        """It costs one client that needs one, for a look-up; the server goes on."""
        server, origin = self.serve(), self.origin()
        threading.stack_size(1 << 46)           # more than any address space has
        try:
            with Peer(server.server_address) as peer:
                self.assertEqual(peer.connect('localhost', origin.port),
                                 Response(Reply.GENERAL_FAILURE))
            with Peer(server.server_address) as peer:
                self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)
        finally:
            threading.stack_size(0)
        with Peer(server.server_address) as peer:
            self.assertEqual(peer.connect('localhost', origin.port).reply, 0)
        self.assertIn("failed: can't start new thread", self.lines[0])

    def test_look_ups_do_not_wait_for_each_other(self):
        """One that hangs takes a thread, until it ends, and no time from others."""
        event = self.slow_names()
        server, origin = self.serve(connect_timeout=1), self.origin(echo)
        slow = [self.peer(server.server_address) for _ in range(24)]
        for number, peer in enumerate(slow):
            peer.begin(1, Address('%d.slow' % number, origin.port))
        peer = self.peer(server.server_address)
        self.assertEqual(peer.connect('localhost', origin.port).reply, 0)
        for peer in slow:
            self.assertEqual(Response.unpack(peer.read).reply, Reply.TTL_EXPIRED)
            peer.sock.close()
        eventually(lambda: len(server.clients) == 1)
        event.set()                             # now they fail, and nobody waits for them
        for _ in range(50):
            with Peer(server.server_address) as peer:
                self.assertEqual(peer.connect('localhost', origin.port).reply, 0)
        pool = [thread for thread in threading.enumerate() if thread.name == 'socks-pool']
        self.assertGreater(len(pool), 40)

    def test_one_client_does_not_stop_the_look_ups_of_others(self):
        """Its own wait for each other; even for a name that it asked for among many."""
        event = self.slow_names()
        server, origin = self.serve(), self.origin(echo)
        slow = [self.peer(server.server_address) for _ in range(300)]
        for number, peer in enumerate(slow):
            peer.begin(1, Address('%d.slow' % number, origin.port))
        last = self.peer(server.server_address)
        last.begin(1, Address('localhost', origin.port))
        eventually(lambda: 'localhost' in server.resolver._queries)
        with Peer(server.server_address, ('127.0.0.2', 0)) as other:
            self.assertEqual(other.connect('localhost', origin.port).reply, 0)
        self.assertEqual(Response.unpack(last.read).reply, 0)
        self.assertIn('299.slow', server.resolver._queries)
        event.set()
        for peer in slow:
            self.assertEqual(Response.unpack(peer.read).reply, Reply.GENERAL_FAILURE)
        eventually(lambda: not server._pool._shares)

    def test_long_timeouts(self):
        """Longer than any system call can wait."""
        server, origin = self.serve(handshake_timeout=1e9, idle_timeout=1e9), self.origin(echo)
        peer = self.peer(server.server_address)
        self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)
        peer.send(b'x')
        self.assertEqual(peer.read(1), b'x')

    def test_bug_in_a_handler(self):
        """It costs one client, and is logged with its traceback."""
        class Broken(socks.Handler):
            def do_CONNECT(self, request):
                if request.address.port == 1:
                    raise ZeroDivisionError
                return super().do_CONNECT(request)

        server, origin = self.serve(Broken), self.origin(echo)
        with Peer(server.server_address) as peer, self.assertRaises((OSError, EOFError)):
            peer.connect('127.0.0.1', 1)
        with Peer(server.server_address) as peer:
            self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)
        self.assertRegex(self.lines[0], r' CONNECT 127.0.0.1:1: failed: this is a bug, 0 bytes')
        self.assertRegex(self.lines[1], r'^127.0.0.1:\d+: this is a bug$')
        self.bugs.records.clear()
        eventually(lambda: not server.clients)


class Inside(DatagramCase):
    """In a network namespace of our own: 198.51.100.1 is ours, and some routes fail."""

    def test_unreachable(self):
        """R-10, R-11, R-13: the errors of routes."""
        server = self.serve()
        for host, reply in (('203.0.113.5', Reply.HOST_UNREACHABLE),
                            ('1.2.3.4', Reply.NETWORK_UNREACHABLE),
                            ('2001:db8::1', NO_IPV6_ROUTE),
                            ('192.0.2.1', Reply.GENERAL_FAILURE)):
            with self.subTest(host), Peer(server.server_address) as peer:
                self.assertEqual(peer.connect(host, 80), Response(reply))

    def test_client_from_elsewhere(self):
        """It may reach hosts, but not what is local to the proxy, nor the proxy itself."""
        server = self.serve(host='198.51.100.1', open=True)
        port = self.origin(echo, host='0.0.0.0').port
        for host, number, reply in [
                ('198.51.100.1', port, Reply.SUCCEEDED), ('::ffff:198.51.100.1', port, 0),
                ('198.51.100.1', server.server_address.port, Reply.NOT_ALLOWED),
                ('127.0.0.1', port, Reply.NOT_ALLOWED), ('localhost', port, Reply.NOT_ALLOWED),
                ('127.1', port, Reply.NOT_ALLOWED), ('::1', port, Reply.NOT_ALLOWED),
                ('::ffff:127.0.0.1', port, Reply.NOT_ALLOWED),
                ('169.254.169.254', 80, Reply.NOT_ALLOWED), ('0.0.0.0', port, 1)]:
            with self.subTest(host), Peer(server.server_address) as peer:
                self.assertEqual(peer.sock.getsockname()[0], '198.51.100.1')
                self.assertEqual(peer.connect(host, number).reply, reply)

    def test_bind_and_udp_from_elsewhere(self):
        """What a client from elsewhere may not CONNECT to, it may not BIND for or send to."""
        server, echo = self.serve(host='198.51.100.1', open=True), self.enter(Echo('127.0.0.1'))
        for host, reply in (('198.51.100.1', 0), ('127.0.0.1', 2), ('0.0.0.0', 2)):
            with self.subTest(host), Peer(server.server_address) as peer:
                self.assertEqual(peer.request(2, Address(host, 0)).reply, reply)
        with Associate(server) as client, Echo('198.51.100.1') as ours:
            client.send(Datagram(echo.address, b'no').pack())
            self.assertEqual(client.ask(Datagram(ours.address, b'yes').pack())[-5:], b'E:yes')
            self.assertEqual(echo.seen, [])

    def test_shared_port_from_elsewhere(self):
        """No client reaches it as a target, to send in the name of another one."""
        server = self.serve(host='198.51.100.1', open=True, udp_port=unused_port())
        with Associate(server) as client, Associate(server) as other, \
                Echo('198.51.100.1') as ours:
            through = Datagram(client.relay, Datagram(ours.address, b'no').pack())
            client.send(through.pack())
            self.assertEqual(client.ask(Datagram(ours.address, b'yes').pack())[-5:], b'E:yes')
            self.assertEqual(other.ask(Datagram(ours.address, b'yes').pack())[-5:], b'E:yes')
            self.assertEqual(ours.seen, [b'yes', b'yes'])

    def test_bursts_beyond_the_mtu(self):
        """Larger datagrams are sent one by one, in fragments; smaller ones are still joined."""
        server = self.serve()
        client = self.enter(Associate(server))
        for mtu in 1500, 65536:
            command = 'ip', 'link', 'set', 'lo', 'mtu', str(mtu)
            self.assertEqual(run(*command).returncode, 0)
            self.check_bursts(client, self.relay_in(server), [3000] * 5 + [1000] * 5 + [1400] * 3)
        if socks.can_segment():
            relay = self.relay_in(server)
            self.assertEqual((relay.up._largest, relay.down._largest), (2999, 3009))

    def test_bind_for_a_peer_elsewhere(self):
        """A client on this host: the peer connects to the address that it would see."""
        server = self.serve()
        client = self.peer(server.server_address)
        address = client.request(2, Address('198.51.100.1', 0)).address
        self.assertEqual(address.host, '198.51.100.1')
        self.peer(address, ('198.51.100.1', 0))
        self.assertEqual(Response.unpack(client.read).reply, 0)
        client = self.peer(server.server_address)
        self.assertEqual(client.request(2, Address('1.2.3.4', 0)),
                         Response(Reply.NETWORK_UNREACHABLE))

    def link_local(self):
        """One of ours, with its zone."""
        host = 'fe80::1%lo'
        with socket.socket(socket.AF_INET6) as sock:
            try:
                sock.bind(socket.getaddrinfo(host, 0)[0][4])
            except OSError as error:
                self.skipTest(f'{host}: {error}')
        return host

    def test_a_client_of_a_link_local_address(self):
        """The listener has a zone, which goes into no reply; CONNECT, UDP, BIND and ident work."""
        host = self.link_local()
        rules = tuple(socks.parse_rule(line, 'rule') for line in (
            'allow bind to fe80::/10 0.0.0.0/0', 'allow from fe80::/10 to 198.51.100.0/24'))
        server = self.serve(host=host, open=True, rules=rules, ident=True, udp_port=unused_port())
        self.assertEqual(server.server_address.host, host)
        there = socket.getaddrinfo(host, server.server_address.port, 0, socket.SOCK_STREAM)[0][4]
        origin = self.origin(echo, host='198.51.100.1')

        def client():
            sock = socket.socket(socket.AF_INET6)
            sock.connect(there)
            return self.enter(Peer(sock))

        self.assertEqual(client().connect('198.51.100.1', origin.port).reply, 0)
        for target in 'fe80::1', '0.0.0.0':
            peer = client()
            first = peer.request(2, Address(target, 0))
            self.assertEqual((first.reply, first.address.host), (0, 'fe80::1'))
            with socket.socket(socket.AF_INET6) as sock:
                sock.connect((*first.address, 0, there[3]))
                self.assertEqual(Response.unpack(peer.read).address,
                                 ('fe80::1', sock.getsockname()[1]))
        peer, target = client(), self.enter(Echo('198.51.100.1'))
        relay = peer.request(3, socks.UNSPECIFIED).address
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            sock.sendto(Datagram(target.address, b'x').pack(), (*relay, 0, there[3]))
            self.assertEqual(Datagram.unpack(sock.recv(100)).payload, b'E:x')
        peer = client()
        request = Request4(1, Address('198.51.100.1', origin.port))
        self.assertEqual(peer.ask(request, Response4).code, 0x5c)
        eventually(lambda: any('ident: Connection refused' in line for line in self.lines))
        self.assertEqual([line for line in self.lines if '%' in line], [])

    def test_a_link_local_source(self):
        host = self.link_local()
        origin = self.enter(socket.socket(socket.AF_INET6))
        origin.bind(socket.getaddrinfo(host, 0)[0][4])
        origin.listen(1)
        server = self.serve(source=(host,))
        response = self.peer(server.server_address).connect('fe80::1', origin.getsockname()[1])
        self.assertEqual((response.reply, response.address.host), (0, 'fe80::1'))
        for refused in 'fe80::1%lo', 'fe80::1%1', '[fe80::1%lo]':
            self.assertEqual(self.peer(server.server_address).connect(refused, 1).reply,
                             Reply.GENERAL_FAILURE)

    def test_no_such_zone(self):
        self.link_local()
        with self.assertRaisesRegex(OSError, r"on \[fe80::1%x\]:\d+: there is no interface 'x'"):
            socks.Server(('fe80::1%x', 0), Settings(open=True))
        with self.assertRaisesRegex(OSError, 'connect from fe80::1%x: not an address'):
            socks.Server(('127.0.0.1', 0), Settings(source=('fe80::1%x',)))

    def test_advertise(self):
        """The address that is told; and listened on, if it is ours."""
        for told in ('203.0.113.9', '198.51.100.2'):
            server = self.serve(host='198.51.100.1', open=True, advertise=('2001:db8::1', told))
            for command in (2, 3):
                peer = self.peer(server.server_address)
                address = peer.request(command, Address('198.51.100.1', 0)).address
                self.assertEqual(address.host, told)
                if (told, command) == ('198.51.100.2', 2):
                    self.peer(address, ('198.51.100.1', 0))
                    self.assertEqual(Response.unpack(peer.read).reply, 0)


def needs(*programs):
    """Skip a test where one of the programs is missing."""
    missing = [program for program in programs if not shutil.which(program)]
    return unittest.skipIf(missing, f'not installed: {", ".join(missing)}')


def run(*command, **options):
    """The finished process, its output as text."""
    if 'input' not in options:
        options['stdin'] = subprocess.DEVNULL
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                          universal_newlines=True, **options)


class NamespaceTest(unittest.TestCase):

    @needs('unshare', 'ip')
    def test_inside(self):
        """The tests of Inside and InsideClient, in a namespace where they can set routes."""
        script = ('ip link set lo up; ip address add 198.51.100.1/32 dev lo;'
                  'ip address add 198.51.100.2/32 dev lo; ip route add unreachable 203.0.113.0/24;'
                  'ip address add fe80::1/64 dev lo nodad || true;'
                  'ip route add prohibit 192.0.2.0/24;'
                  'exec "$0" -m test_socks Inside InsideClient')
        if run('unshare', '-rn', 'true').returncode:
            self.skipTest('this user cannot make namespaces')
        done = run('unshare', '-rn', 'sh', '-ec', script, sys.executable, cwd=HERE)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r'Ran [1-9]')


# ------------------------------------------------------------------------------------------ client

# Of a certificate for localhost and 127.0.0.1, which signs itself; nothing else ever trusts it.
KEY = '''\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgpOP55uIewOclSL4v
MVvSYOCGdVQc4ZaUTL6T//X/Af2hRANCAARX6goLbNm5aaXQ+7IlwQSwm3lV/pYB
PSLlfo9DzswszsYIcFcSPvhYt0ZeHTrwLUUf0miorG9Hqwl4IfxuZD61
-----END PRIVATE KEY-----
'''
CERTIFICATE = '''\
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUEhGZ005Q9HMTGCtGU434qCfrCAcwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTExMzg1MVoYDzIxMjYxMDI4
MTEzODUxWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARX6goLbNm5aaXQ+7IlwQSwm3lV/pYBPSLlfo9DzswszsYIcFcSPvhY
t0ZeHTrwLUUf0miorG9Hqwl4IfxuZD61o28wbTAdBgNVHQ4EFgQU1lZTUVO+nE/j
pE8YJWVx2mc4gqUwHwYDVR0jBBgwFoAU1lZTUVO+nE/jpE8YJWVx2mc4gqUwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSQAwRgIhALbzeUbTa3XbLmZpRSPpGeTd3qg0QJmGYL+o1D/OqX1+AiEA
i1Rla78yky7Fytd35gS6sXmZImE0XFUMey9w7DppEm0=
-----END CERTIFICATE-----
'''


# The same key, with the passphrase "secret", and another key with its certificate.
ENCRYPTED_KEY = '''\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAg/dLlN0kiPqwICA+gw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEFtzP2ZfkUmbW19uMPhoqhgEgZBG
2RQ94YQIKlyx3MdQKVys7idMGgmfDmyRgjaHOh8MPMBHJsYT7WcEkGflfn2i/kDZ
CScIApN7eoMhpjQwkXMODBPk+GKtNqAbbaimALNFH5qIfg5tZVLow5mkXMO2udox
CKuV1Kf/pHE7gbdzSAT51o0o0T8G4Cs9gYmYvaBWnAC1oU2uswbn7qkmfNeobPw=
-----END ENCRYPTED PRIVATE KEY-----
'''
OTHER_KEY = '''\
-----BEGIN PRIVATE KEY-----
MEECAQAwEwYHKoZIzj0CAQYIKoZIzj0DAQcEJzAlAgEBBCDmyrECbZTqeJq23vKw
GVTrC9C23k/guMNq9rRbvZdANg==
-----END PRIVATE KEY-----
'''
OTHER_CERTIFICATE = '''\
-----BEGIN CERTIFICATE-----
MIIBdjCCAR2gAwIBAgIUXxMSyp0tqdFo/BCg4T48HS78ZZYwCgYIKoZIzj0EAwIw
EDEOMAwGA1UEAwwFb3RoZXIwIBcNMjYxMTI3MDE1ODAwWhgPMjEyNjExMDMwMTU4
MDBaMBAxDjAMBgNVBAMMBW90aGVyMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
ad5xgG52gDTJxhLyKfbGd9C/jyGZDmprc6mqSE01d/2Q9lNKbBopQ5xSARxb0DQS
qxwJa1UKUA4s5zJ4hmZDBaNTMFEwHQYDVR0OBBYEFPHbKpGyP+OThbw1NtCvWkBy
IDYuMB8GA1UdIwQYMBaAFPHbKpGyP+OThbw1NtCvWkByIDYuMA8GA1UdEwEB/wQF
MAMBAf8wCgYIKoZIzj0EAwIDRwAwRAIgSp4uhtt4E9WTkza61nRCilis5qVj0vAI
cuxwL41V6fUCIFV89VNXka62t4XNdbU9YUmN/wfjGcOyD1TdBjK5O388
-----END CERTIFICATE-----
'''


def server_context():
    """Of a TLS server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'both')
        with open(path, 'w') as file:
            file.write(KEY + CERTIFICATE)
        context.load_cert_chain(path)
    return context


def client_context():
    """Of a TLS client that trusts it."""
    return ssl.create_default_context(cadata=CERTIFICATE)


NAME = '0b6578616d706c652e6f7267'       # example.org, as a SOCKS5 name
IP5, OK5 = '0501000101020304 0050', '0500000105060708 0051'
OK4, OK6 = '005a005105060708', '0600 0000 0051 00 01 05060708'
IP6 = '0601 0000 0050 00 01 01020304'
HEAD = b'CONNECT example.org:80 HTTP/1.1\r\nHost: example.org:80\r\n'.hex()


def crlf(text):
    return text.replace('\n', '\r\n').encode().hex()


ASK_HTTP = crlf('CONNECT 1.2.3.4:80 HTTP/1.1\nHost: 1.2.3.4:80\n\n')


# What a scripted proxy must be told and what it answers, in turn: (name, URL's beginning and its
# user, host to connect to, script, BND).
ACCEPTING = [
    ('SOCKS5', 'socks5h://', 'example.org',
     ['050100', '0500', f'05010003{NAME}0050', OK5], ('5.6.7.8', 81)),
    ('SOCKS5, IPv4', 'socks5h://', '1.2.3.4', ['050100', '0500', IP5, OK5], ('5.6.7.8', 81)),
    ('SOCKS5, IPv6', 'socks5h://', '[2001:db8::1]',
     ['050100', '0500', '05010004 20010db8 0000*4 0000 0001 0050'.replace('0000*4', '0000' * 4),
      OK5], ('5.6.7.8', 81)),
    ('SOCKS5, mapped', 'socks5h://', '::ffff:1.2.3.4', ['050100', '0500', IP5, OK5],
     ('5.6.7.8', 81)),
    ('SOCKS5, looked up here', 'socks5://', 'localhost',
     ['050100', '0500', '050100017f0000010050', OK5], ('5.6.7.8', 81)),
    ('SOCKS5, password', 'socks5h://bob:s%20%40@', '1.2.3.4',
     ['05020002', '0502', '0103626f6203732040', '0100', IP5, OK5], ('5.6.7.8', 81)),
    ('SOCKS5, password not wanted', 'socks5h://bob:s@', '1.2.3.4',
     ['05020002', '0500', IP5, OK5], ('5.6.7.8', 81)),
    ('SOCKS5, user only', 'socks5h://bob@', '1.2.3.4',
     ['05020002', '0502', '0103626f6200', '0100', IP5, OK5], ('5.6.7.8', 81)),
    ('SOCKS5, verdict of version 5', 'socks5h://bob:s@', '1.2.3.4',
     ['05020002', '0502', '0103626f620173', '0500', IP5, OK5], ('5.6.7.8', 81)),
    ('K-01', 'socks5h://', '1.2.3.4', ['050100', '0500', IP5, '05000004' + '00' * 18], ('::', 0)),
    ('K-02', 'socks5h://', '1.2.3.4', ['050100', '0500', IP5, '0500000301610000'], ('a', 0)),
    ('K-03', 'socks5h://', '1.2.3.4', ['050100', '0500', IP5, '05000003000000'], ('', 0)),
    ('SOCKS4', 'socks4a://', '1.2.3.4', ['04010050 01020304 00', OK4], ('5.6.7.8', 81)),
    ('SOCKS4, userid', 'socks4a://bob@', '1.2.3.4', ['0401005001020304626f6200', OK4],
     ('5.6.7.8', 81)),
    ('SOCKS4a', 'socks4a://', 'example.org',
     ['0401005000000001 00' + NAME[2:] + '00', OK4], ('5.6.7.8', 81)),
    ('SOCKS4, looked up here', 'socks4://', 'localhost', ['040100507f00000100', OK4],
     ('5.6.7.8', 81)),
    ('K-12', 'socks4a://', '1.2.3.4', ['040100500102030400', '045a005105060708'], ('5.6.7.8', 81)),
    ('SOCKS6', 'socks6h://', 'example.org',
     [f'0601 0000 0050 00 03 {NAME}', '0600 0000' + OK6], ('5.6.7.8', 81)),
    ('SOCKS6, looked up here', 'socks6://', 'localhost',
     ['0601 0000 0050 00 01 7f000001', '0600 0000' + OK6], ('5.6.7.8', 81)),
    ('SOCKS6, password', 'socks6h://bob:secret@', '1.2.3.4',
     ['0601 0014 0050 00 01 01020304 0004 0014 02 01 03 626f62 06 736563726574 000000',
      '0600 0008 0004 0008 02 01 00 00' + OK6], ('5.6.7.8', 81)),
    ('SOCKS6, options in the replies', 'socks6h://', '1.2.3.4',
     ['0601 0000 0050 00 01 01020304', '0600 0004 fc00 0004 0600 0008 0000 00 03 03 610000'
      '0001 0008 81 02 02 00'], ('a', 0)),
    ('HTTP', 'http://', 'example.org', [HEAD + '0d0a', crlf('HTTP/1.1 200 OK\n\n')],
     ('0.0.0.0', 0)),
    ('HTTP, 201, no phrase', 'http://', 'example.org', [HEAD + '0d0a', crlf('HTTP/1.0 201\n\n')],
     ('0.0.0.0', 0)),
    ('HTTP/2', 'http://', 'example.org', [HEAD + '0d0a', crlf('HTTP/2 200 OK\n\n')],
     ('0.0.0.0', 0)),
    ('HTTP, more in the head', 'http://', 'example.org',
     [HEAD + '0d0a', crlf('HTTP/1.1 200 OK\nVia: x\nContent-Length: 5\n\n')], ('0.0.0.0', 0)),
    ('HTTP, which takes its time', 'http://', 'example.org',
     [HEAD + '0d0a', crlf('HTTP/1.1 102 Wait\n\nHTTP/1.1 103 Hints\nLink: x\n\n'
                          'HTTP/1.1 200 OK\n\n')], ('0.0.0.0', 0)),
    ('HTTP, IPv6', 'http://', '::1',
     [crlf('CONNECT [::1]:80 HTTP/1.1\nHost: [::1]:80\n\n'), crlf('HTTP/1.1 200 OK\n\n')],
     ('0.0.0.0', 0)),
    ('HTTP, password', 'http://bob:secret@', 'example.org',
     [HEAD + crlf('Proxy-Authorization: Basic Ym9iOnNlY3JldA==\n\n'),
      crlf('HTTP/1.1 200 OK\n\n')], ('0.0.0.0', 0)),
    ('HTTP, user only', 'http://bob@', 'example.org',
     [HEAD + crlf('Proxy-Authorization: Basic Ym9iOg==\n\n'), crlf('HTTP/1.1 200 OK\n\n')],
     ('0.0.0.0', 0)),
]

# A script, and the exception with its text, its cause's text and errno.
GENERAL, AUTH = socks.GeneralProxyError, socks.SOCKS5AuthError
REFUSING = [
    ('K-06', 'socks5h://', ['050100', '0500', IP5, '05050001'], socks.SOCKS5Error,
     '0x05: Connection refused', errno.ECONNREFUSED),
    ('K-07', 'socks5h://', ['050100', '0500', IP5, '050500'], socks.SOCKS5Error,
     '0x05: Connection refused', errno.ECONNREFUSED),
    ('K-08', 'socks5h://', ['050100', '0500', IP5, '05f00001000000000000'], socks.SOCKS5Error,
     '0xf0: Unknown error', errno.ECONNABORTED),
    ('K-09', 'socks5h://', ['050100', '0502'], AUTH,
     'No username/password supplied. Server requested username/password authentication',
     errno.EACCES),
    ('K-10', 'socks5h://', ['050100', '0500', IP5, '05040000000000000000'], socks.SOCKS5Error,
     '0x04: Host unreachable', errno.EHOSTUNREACH),
    ('K-11', 'socks5h://', ['050100', '005a000000000000'], socks.ProtocolError,
     'SOCKS version 0x00, expected 0x05', errno.ECONNABORTED),
    ('no method', 'socks5h://', ['050100', '05ff'], AUTH,
     'All offered SOCKS5 authentication methods were rejected', errno.EACCES),
    ('method not offered', 'socks5h://', ['050100', '0580'], socks.ProtocolError,
     'the proxy chose method 0x80, which was not offered', errno.ECONNABORTED),
    ('wrong password', 'socks5h://bob:s@', ['05020002', '0502', '0103626f620173', '0101'], AUTH,
     'SOCKS5 authentication failed', errno.EACCES),
    ('wrong password, version 5', 'socks5h://bob:s@',
     ['05020002', '0502', '0103626f620173', '0501'], AUTH, 'SOCKS5 authentication failed',
     errno.EACCES),
    ('version in the reply', 'socks5h://', ['050100', '0500', IP5, '040000'], socks.ProtocolError,
     'SOCKS version 0x04, expected 0x05', errno.ECONNABORTED),
    ('address type in the reply', 'socks5h://', ['050100', '0500', IP5, '05000002'],
     socks.ProtocolError, 'address type 0x02, expected 0x01, 0x03 or 0x04', errno.EAFNOSUPPORT),
    ('reply cut off', 'socks5h://', ['050100', '0500', IP5, '05000001 7f'], GENERAL,
     'Connection closed unexpectedly', errno.ECONNABORTED),
    ('SOCKS4 cut off', 'socks4://', ['040100500102030400', '005a'], GENERAL,
     'Connection closed unexpectedly', errno.ECONNABORTED),
    ('SOCKS4 from SOCKS5', 'socks4://', ['040100500102030400', '0500'], socks.ProtocolError,
     'SOCKS4 reply version 0x05, expected 0x00', errno.ECONNABORTED),
    ('SOCKS6 refused', 'socks6h://', [IP6, '0600 0000 0605 0000 0000 00 01 00000000'],
     socks.SOCKS5Error, '0x05: Connection refused', errno.ECONNREFUSED),
    ('SOCKS6 timed out', 'socks6h://', [IP6, '0600 0000 0609 0000 0000 00 01 00000000'],
     socks.SOCKS5Error, '0x09: Connection attempt timed out', errno.ETIMEDOUT),
    ('SOCKS6, unknown code', 'socks6h://', [IP6, '0600 0000 06f0 0000 0000 00 01 00000000'],
     socks.SOCKS5Error, '0xf0: Unknown error', errno.ECONNABORTED),
    ('SOCKS6, password wanted', 'socks6h://', [IP6, '0601 0008 0003 0008 02 000000'], AUTH,
     'SOCKS6 authentication failed', errno.EACCES),
    ('SOCKS6 from SOCKS5', 'socks6h://', [IP6, '05ff'], socks.ProtocolError,
     'SOCKS version 0x05, expected 0x06', errno.ECONNABORTED),
    ('SOCKS6 of another version', 'socks6h://', [IP6, '06'], GENERAL,
     'Connection closed unexpectedly', errno.ECONNABORTED),
    ('SOCKS6, option of 0', 'socks6h://', [IP6, '0600 0004 0000 0000'], socks.ProtocolError,
     'SOCKS6 option 0 of 0 bytes, expected a multiple of 4, from 4 to 4', errno.ECONNABORTED),
    ('HTTP from SOCKS5', 'http://', [ASK_HTTP, '05ff'], GENERAL, 'Connection closed unexpectedly',
     errno.ECONNABORTED),
    ('SOCKS5 from HTTP', 'socks5h://', ['050100', crlf('HTTP/1.0 400 Bad\n\n')],
     socks.ProtocolError, 'SOCKS version 0x48, expected 0x05', errno.ECONNABORTED),
    ('HTTP 407', 'http://', [ASK_HTTP, crlf('HTTP/1.1 407 Proxy Authentication Required\n\n')],
     socks.HTTPError, '407: Proxy Authentication Required', errno.ECONNABORTED),
    ('HTTP 403', 'http://', [ASK_HTTP, crlf('HTTP/1.1 403 Forbidden\n\n')], socks.HTTPError,
     '403: Forbidden; the proxy may not support tunnels (CONNECT)', errno.ECONNABORTED),
    ('HTTP, a phrase for terminals', 'http://',
     [ASK_HTTP, 'HTTP/1.1 502 \x1b[2J\x9b1m\xa0\u2800 it\'s\r\n'.encode('utf-8').hex()],
     socks.HTTPError, r"502: \x1b[2J\xc2\x9b1m\xc2\xa0\xe2\xa0\x80 it's", errno.ECONNABORTED),
    ('no HTTP', 'http://', [ASK_HTTP, b'SSH-2.0-x\r\n'.hex()], socks.ProtocolError,
     "b'SSH-2.0-x', expected the status line of an HTTP proxy", errno.ECONNABORTED),
    ('endless HTTP line', 'http://', [ASK_HTTP, crlf('HTTP/1.1 200 OK\nx: ') + '61' * 9000],
     socks.ProtocolError, 'an HTTP line of more than 8192 bytes', errno.ECONNABORTED),
    ('endless interim answers', 'http://', [ASK_HTTP, crlf('HTTP/1.1 100 OK\n\n' * 60)],
     socks.ProtocolError, 'more than 100 lines in the head of an HTTP answer',
     errno.ECONNABORTED),
    ('endless HTTP head', 'http://', [ASK_HTTP, crlf('HTTP/1.1 200 OK\n' + 'x: y\n' * 101)],
     socks.ProtocolError, 'more than 100 lines in the head of an HTTP answer',
     errno.ECONNABORTED),
] + [
    (f'SOCKS5 reply {code}', 'socks5h://', ['050100', '0500', IP5, f'05{code:02x}0001' + '00' * 6],
     socks.SOCKS5Error, f'{code:#04x}: {socks.SOCKS5_ERRORS[code]}', number)
    for code, number in zip(range(1, 9), (
        errno.ECONNABORTED, errno.EACCES, errno.ENETUNREACH, errno.EHOSTUNREACH,
        errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT))
] + [
    (f'SOCKS4 code {code}', 'socks4://', ['040100500102030400', f'00{code:02x}' + '00' * 6],
     socks.SOCKS4Error, f'{code:#04x}: {socks.SOCKS4_ERRORS.get(code, "Unknown error")}',
     errno.ECONNABORTED) for code in (0x5b, 0x5c, 0x5d, 0x77)
]

PROXY_URLS = [
    ('socks5://h', (2, 'h', None, False, None, None)),
    ('socks5h://h:1', (2, 'h', 1, True, None, None)),
    ('socks4://u@h', (1, 'h', None, False, b'u', None)),
    ('socks4a://h/', (1, 'h', None, True, None, None)),
    ('SOCKS://h', (2, 'h', None, True, None, None)),
    ('http://bob:c%3ac%ff@h:3128', (3, 'h', 3128, True, b'bob', b'c:c\xff')),
    ('socks6h://b:c@h', (4, 'h', None, True, b'b', b'c')),
    ('socks6://h', (4, 'h', None, False, None, None)),
    ('socks6h+tls://h', (socks.SOCKS6 | socks.TLS, 'h', None, True, None, None)),
    ('https://h', (socks.HTTP | socks.TLS, 'h', None, True, None, None)),
    ('socks5h+tls://[::1]:443', (socks.SOCKS5 | socks.TLS, '::1', 443, True, None, None)),
    ('socks5h+unix:///run/a%20b', (2, '/run/a b', None, True, None, None)),
    ('socks5h://localhost/run/s', (2, '/run/s', None, True, None, None)),
    ('socks5h://bob:@h', (2, 'h', None, True, b'bob', None)),
    ('socks5h://h/?optimistic=1', (socks.SOCKS5 | socks.OPTIMISTIC, 'h', None, True, None, None)),
    ('socks5h://h?udp=tcp&optimistic=1', (socks.SOCKS5 | socks.OPTIMISTIC | socks.UDP_IN_TCP, 'h',
                                          None, True, None, None)),
    ('socks5h+unix:///a?optimistic=0', (2, '/a', None, True, None, None)),
    ('socks5://h?', (2, 'h', None, False, None, None)),
    ('socks5h://[fe80::1%25Eth0]:1081', (2, 'fe80::1%Eth0', 1081, True, None, None)),
    ('socks5h://[fe80::1%eth0]', (2, 'fe80::1%eth0', None, True, None, None)),
]

WRONG_URLS = [
    ('ftp://h', 'scheme'), ('h:1080', 'scheme'), ('', 'scheme'), ('socks5h+x://h', 'scheme'),
    ('socks5://', 'host missing'), ('socks5://:1080', 'host missing'), ('socks5://h:x', 'port'),
    ('socks5://h:65536', 'port'), ('socks5://h/x', 'no path'), ('socks5://h?ppp', 'optimistic=1'),
    ('socks5://h?optimistic=1&optimistic=1', 'optimistic=1'), ('socks5://h#ppp', 'no "#"'),
    ('socks5://h?optimistic=2', 'optimistic=1'), ('socks5+unix:///a?ppp', 'optimistic=1'),
    ('socks5h://h?udp=tcp&udp=tcp', 'udp=tcp'), ('socks5h://h?udp=udp', 'udp=tcp'),
    ('socks4://h?udp=tcp', 'of type SOCKS5'), ('socks6h+gssapi://h', 'GSSAPI'),
    ('socks5+unix://', 'path'), ('socks5://' + 'u' * 256 + '@h', 'username of 256 bytes'),
    ('socks6h://' + 'u' * 256 + '@h', 'username of 256 bytes'),
    ('socks5://u:' + 'p' * 256 + '@h', 'password of 256 bytes'), ('socks4://a%00@h', 'userid'),
    ('http://a%3ab:x@h', 'colon'), ('http://b%3ab:c%3ac@h:3128', 'colon'),
]

BYPASS = [
    ('localhost', 'localhost', True), ('localhost', 'LOCALHOST.', True),
    ('localhost', 'notlocalhost', False), ('.local', 'a.local', True), ('.local', 'local', True),
    ('local', 'a.local', True), ('example.org', 'badexample.org', False), ('*', 'x', True),
    ('10.0.0.0/8', '10.1.2.3', True), ('10.0.0.0/8', '11.1.2.3', False),
    ('127.0.0.1', '127.0.0.1', True), ('127.0.0.1', '::ffff:127.0.0.1', True),
    ('[::1]', '::1', True), ('fe80::/10, ::1', '::1', True), ('a b,c', 'c', True),
    ('10.0.0.1/8', '10.2.2.2', True), ('', 'x', False), ('127.0.0.1', 'localhost', False),
    ('*.example.org', 'www.example.org', True), ('*.example.org', 'a.b.EXAMPLE.org.', True),
    ('*.example.org', 'badexample.org', False), ('*.example.org', 'example.org', False),
    ('.example.org.', 'example.org', True), ('.', 'x', False), ('*.', 'x', False),
    ('x:81', 'x', False), ('x:80', 'x', True), ('.x:80', 'a.x', True), ('*:80', 'y', True),
    ('*:81', 'y', False), ('[::1]:80', '::1', True), ('[::1]:81', '::1', False),
    ('::1', '[::1]', True), ('127.0.0.1:80', '127.0.0.1', True), ('x:', 'x', False),
    ('127.0.0.1:81', '127.0.0.1', False), ('10.0.0.0/8:80', '10.1.1.1', True),
    ('fe80::/10', 'fe80::1%eth0', True), ('b\xfccher.example', 'xn--bcher-kva.example', True),
    ('.b\xfccher.example', 'a.b\xfccher.example', True), ('\u2603.net', '\u2603.net', True),
    ('.fa\xdf.example', 'a.FA\xdf.example.', True), ('xn--n3h.net', '\u2603.net', True),
    ('*.fa\xdf.example', 'a.fass.example', True), ('example.org', '*.Example.org', True),
    ('10.0.0.0/8', '\uff11\uff10.0.0.1', True), ('fa\xdf.example', 'xn--fa-hia.example', False),
    ('xn--bcher-kva.example', 'b\xfccher.example', True), ('300.1.1.1', '10.0.0.1', False),
]


def leave(peer):
    """Close."""


def be_silent(peer):
    peer.rest()


class Scripted(Origin):
    """A proxy that expects what it is told to, answers as told, sends `then`, and does `last`; what
    is not as expected fails the test at its end."""

    def __init__(self, script, step=None, tls=False, then=b'', last=echo, **options):
        steps = [hexed(text) for text in script]

        def function(peer):
            if tls:
                peer.sock = context.wrap_socket(peer.sock, server_side=True)
            with peer:
                for expected, answer in zip(steps[::2], steps[1::2]):
                    got = peer.read(len(expected))
                    if got != expected:
                        raise AssertionError(f'{got.hex()} came, expected {expected.hex()}')
                    peer.send(answer, step)
                peer.send(then)
                last(peer)

        context = server_context() if tls else None
        super().__init__(function, **options)


def serve_tls(peer):
    """Answer in capitals, inside of TLS."""
    with server_context().wrap_socket(peer.sock, server_side=True) as sock:
        sock.sendall(sock.recv(100).upper())
        sock.recv(1)


class ClientCase(Case):

    def setUp(self):
        socks.background_loop()                 # its thread stays
        super().setUp()

    def scripted(self, *args, **kwargs):
        return self.enter(Scripted(*args, **kwargs))

    def url(self, server, scheme='socks5h', user=''):
        address = server.server_address
        return f'{scheme}://{user}{Address(*address[:2])}'

    def run_async(self, job):
        loop = asyncio.new_event_loop()
        with concurrent.futures.ThreadPoolExecutor() as executor:
            loop.set_default_executor(executor)
            try:
                return loop.run_until_complete(job)
            finally:
                loop.close()

    def check_echo(self, sock, data=b'some bytes'):
        sock.sendall(data)
        received = b''
        while len(received) < len(data):
            received += sock.recv(65536)
        self.assertEqual(received, data)

    def check_datagram(self, sock, data, target, is_answered=True):
        """All of it is sent to an `Echo`, which answers with its prefix."""
        self.assertEqual(sock.sendto(data, target.address), len(data))
        if is_answered:
            self.assertEqual(sock.recvfrom(1 << 16), (b'E:' + data, target.address))


class ClientTest(ClientCase):

    def test_accepting_proxies(self):
        """Whatever comes behind the last reply is the program's, from its first byte on."""
        for (name, start, host, script, bnd), step in itertools.product(ACCEPTING, (None, 1)):
            with self.subTest(name, step=step):
                proxy = self.scripted(script, step, then=b'Hello')
                url = f'{start}127.0.0.1:{proxy.port}'
                with socks.create_connection((host, 80), PATIENCE, proxy=url) as sock:
                    self.assertEqual(sock.recv(5, socket.MSG_WAITALL), b'Hello')
                    self.check_echo(sock)
                    self.assertEqual(sock.getpeername(), (host.strip('[]'), 80))
                    self.assertEqual(sock.get_proxy_sockname(), bnd)
                    self.assertEqual(sock.get_proxy_peername(), ('127.0.0.1', proxy.port))
                    self.assertEqual(sock.gettimeout(), PATIENCE)

    def test_refusing_proxies(self):
        for (name, start, script, kind, text, number), step in itertools.product(
                REFUSING, (None, 1)):
            if step and len(script[-1]) >= 1000:
                continue
            with self.subTest(name, step=step):
                proxy = self.scripted(script, step, last=leave)
                url = f'{start}127.0.0.1:{proxy.port}'
                with self.assertRaises(GENERAL) as caught:
                    socks.create_connection(('1.2.3.4', 80), PATIENCE, proxy=url)
                error = caught.exception
                where = f'{socks.parse_proxy_url(url)}, target 1.2.3.4:80'
                self.assertEqual((type(error), str(error), type(error.socket_err),
                                  str(error.socket_err), error.socket_err.errno, error.errno),
                                 (kind, f'Socket error: {text} ({where})', kind, text, None,
                                  number))
                with socks.socksocket(proxy=url) as sock:
                    self.assertEqual(sock.connect_ex(('1.2.3.4', 80)), number)
                    self.assertEqual(sock.fileno(), -1)

    def test_silent_proxies(self):
        def fails(url):
            with self.assertRaises(GENERAL) as caught:
                socks.create_connection(('1.2.3.4', 80), 0.3, proxy=url)
            error = caught.exception
            for kind in TimeoutError, socket.timeout:
                self.assertIsInstance(error, kind)
            self.assertIsInstance(error.socket_err, socket.timeout)
            self.assertRegex(str(error), '^Socket error: timed out ')
            self.assertRegex(repr(error), r"Error\('Socket error', .*'timed out',?\).*1.2.3.4:80")
            self.assertIs(type(pickle.loads(pickle.dumps(error))), type(error))

        started = time.monotonic()
        jobs = [(start, script, Background(fails, self.url(
            self.scripted(script, last=be_silent), start))) for start, script in (
                ('socks5', []), ('socks5', ['050100', '05']), ('socks4', []), ('http', []),
                ('http', [ASK_HTTP, '48545450']), ('https', []))]
        for start, script, job in jobs:
            with self.subTest(start, script=script):
                job.result()
        self.assertLess(time.monotonic() - started, 3)

    @unittest.skipUnless(hasattr(signal, 'pthread_kill'), 'signals are not for threads here')
    def test_interrupted(self):
        """By KeyboardInterrupt, for example: all is closed at once, in the usual order."""
        def interrupt(*_):
            raise KeyboardInterrupt

        def function(peer):
            peer.read(3)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            self.assertEqual(peer.rest(), b'')

        self.addCleanup(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, interrupt))
        errors = []
        self.addCleanup(setattr, sys, 'unraisablehook', getattr(sys, 'unraisablehook', None))
        sys.unraisablehook = errors.append          # before Python 3.8, nothing calls it
        with socks.socksocket(proxy=self.url(self.origin(function))) as sock:
            with self.assertRaises(KeyboardInterrupt):
                sock.connect(('1.2.3.4', 80))
            self.assertEqual(sock.fileno(), -1)
        del sock
        gc.collect()
        self.assertEqual(errors, [])

    def test_unreachable_proxies(self):
        url = f'socks5://127.0.0.1:{self.refused_port()}'
        with self.assertRaises(socks.ProxyConnectionError) as caught:
            socks.create_connection(('1.2.3.4', 80), proxy=url)
        self.assertRegex(str(caught.exception),
                         r'^Error connecting to SOCKS5 proxy 127.0.0.1:\d+: \[Errno %d\] '
                         % errno.ECONNREFUSED)
        self.assertEqual(caught.exception.errno, errno.ECONNREFUSED)
        self.assertNotIsInstance(caught.exception, GENERAL)
        with socks.socksocket(proxy=f'http://127.0.0.1:{self.silent_port()}') as sock:
            sock.settimeout(0.2)
            with self.assertRaises(socks.ProxyConnectionError) as caught:
                sock.connect(('1.2.3.4', 80))
        self.assertEqual(str(caught.exception.socket_err), 'timed out')
        self.assertIsInstance(caught.exception, socket.timeout)
        self.assertIsInstance(caught.exception, TimeoutError)
        for name in ('nowhere.invalid', 'no..where', 'x' * 64):
            with socks.default_proxy(f'socks4://{name}'), socks.socksocket() as sock:
                self.check_unknown_proxy(socks.create_connection)
                self.check_unknown_proxy(sock.connect)

    def check_unknown_proxy(self, connect):
        """A proxy whose name has no address cannot be reached."""
        with self.assertRaises(socks.ProxyConnectionError) as caught:
            connect(('1.2.3.4', 80))
        self.assertIsInstance(caught.exception.socket_err, socket.gaierror)

    def test_unknown_names(self):
        """Where we look them up; connect_ex() raises for them, too."""
        server = self.serve()
        for method in ('connect', 'connect_ex'):
            with socks.socksocket(proxy=self.url(server, 'socks5')) as sock:
                with self.assertRaises(GENERAL) as caught:
                    getattr(sock, method)(('nowhere.invalid', 80))
                self.assertIsInstance(caught.exception.socket_err, socket.gaierror)

    def test_errors_are_kept(self):
        """They can be pickled and copied; the class can be asked for in all the usual ways."""
        url = self.url(self.scripted(['05020002', '0500', IP5, '05020001'], last=leave))
        try:
            socks.create_connection(('1.2.3.4', 80), proxy=url.replace('//', '//bob:secret@'))
        except socks.ProxyError as error:
            for other in pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error):
                self.assertEqual((type(other), str(other), repr(other), other.msg, other.reply,
                                  other.errno, other.proxy, other.target),
                                 (socks.SOCKS5Error, str(error), repr(error), error.msg, 2,
                                  errno.EACCES, socks.parse_proxy_url(url), ('1.2.3.4', 80)))
            self.assertEqual(error.msg, 'Socket error: 0x02: Connection not allowed by ruleset')
            self.assertEqual(str(error), f'{error.msg} ({error.proxy}, target 1.2.3.4:80)')
            self.assertIsInstance(error, (socks.GeneralProxyError, OSError))
            self.assertNotIn(b'secret', pickle.dumps(error))

    def test_what_cannot_be_asked(self):
        """Said before anything is sent."""
        proxy = self.origin()
        for scheme, pair in (('socks5h', ('', 80)), ('socks5h', ('a b', 80)),
                             ('http', ('a\r\n', 80)), ('socks5h', ('a' * 256, 80)),
                             ('socks5h', ('h', 65536)), ('socks5h', ('h', '80')),
                             ('socks5h', (None, 80)), ('socks5h', ('h', True)),
                             ('socks5h', ('h',)), ('socks4a', ('::1', 80)),
                             ('socks5h', ('\udcff', 80)), ('http', ('a?.example.org', 80)),
                             ('socks5h', ('a%.example.org', 80)), ('socks4a', ('a\\116.org', 80)),
                             ('http', ('[10.0.0.4]', 80)), ('socks5h', ('[[::1]]', 80)),
                             ('socks5', ('a/b.example', 80)), ('socks5h', ('a' * 64, 80)),
                             ('http', ('a@b.example', 80)), ('socks5h', ('a..example', 80)),
                             ('socks5h', ('a\0.example', 80)), ('http', ('h:80', 80)),
                             ('socks5h', ('\u2100.example', 80)),       # a/c
                             ('socks5h', ('\u00df' * 100000, 80))):
            with self.subTest(pair), socks.socksocket(proxy=self.url(proxy, scheme)) as sock, \
                    self.assertRaises(GENERAL):
                sock.settimeout(PATIENCE)
                sock.connect(pair)
        self.assertEqual(proxy.peers, [])
        with self.assertRaises(OSError) as caught, \
                socks.socksocket(type=socket.SOCK_DGRAM, proxy='socks4://h') as sock:
            sock.bind(('', 0))
        self.assertEqual(caught.exception.errno, errno.EOPNOTSUPP)

    def test_unusual_names(self):
        """They are sent as the codec of Python encodes them, as PySocks does."""
        for host, sent in (('fa\u00df.example', b'fass.example'), ('\u2603.net', b'xn--n3h.net'),
                           ('*.example.org', b'*.example.org'), ('\uff11.2.3.4a', b'1.2.3.4a'),
                           ('b\u00fccher.X.', b'xn--bcher-kva.X.')):
            with self.subTest(host):
                name = bytes([len(sent)]) + sent
                proxy = self.scripted(['050100', '0500', f'05010003{name.hex()}0050', OK5])
                with socks.create_connection((host, 80), PATIENCE, proxy=self.url(proxy)) as sock:
                    self.check_echo(sock)
                    self.assertEqual(sock.getpeername(), (host, 80))
                proxy = self.scripted([(b'CONNECT %b:80 HTTP/1.1\r\nHost: %b:80\r\n\r\n'
                                        % (sent, sent)).hex(), crlf('HTTP/1.1 200 OK\n\n')])
                url = self.url(proxy, 'http')
                with socks.create_connection((host, 80), PATIENCE, proxy=url) as sock:
                    self.check_echo(sock)

    def test_arguments(self):
        for args, error, text in (
                ((7, 'h'), GENERAL, 'Invalid proxy type: 7'),
                (('socks5', 'h'), ValueError, 'scheme'),
                ((2, ''), ValueError, "address ''"), ((2, 'h', 70000), ValueError, 'port 70000'),
                ((2, 'h', '1'), ValueError, "port '1'"), ((2, None), ValueError, 'address None'),
                ((2, 'h', 1, 'bob', 'secret'), ValueError, 'rdns'),
                ((2, 'h', True), ValueError, 'port True'), ((True, 'h'), GENERAL, 'type: bool'),
                ((2, 'socks5://bob:secret@h'), ValueError, 'address: expected .* not a URL, and'),
                ((2, 'h:80'), ValueError, 'address: expected .* and the port by itself'),
                ((2, 'h', 1, True, 'b' * 256), ValueError, 'username of 256 bytes'),
                ((3, 'h', 1, True, 'bob', 5), ValueError, 'user name and password: expected str'),
                ((1, 'h', 1, True, 5), ValueError, 'user name and password: expected str'),
                ((['socks5://h', 'socks5+unix:///x'],), ValueError, 'only be the first')):
            with self.subTest(args), socks.socksocket() as sock:
                for function in (sock.set_proxy, sock.setproxy, socks.set_default_proxy):
                    self.assertRaisesRegex(error, text, function, *args)
                self.assertEqual(sock.proxy, (None,) * 6)
        with socks.socksocket() as sock:
            sock.setproxy(proxytype=2, addr=b'h', port=None, username=b'u', password='p')
            self.assertEqual(sock.proxy, (2, 'h', None, True, b'u', b'p'))
            self.assertEqual(repr(sock.proxy), '<SOCKS5 proxy h:1080 with credentials>')
            sock.set_proxy()
            self.assertEqual(sock.proxy, (None, None, None, True, None, None))
        with self.assertRaisesRegex(ValueError, 'bypass: expected .*, not list'):
            socks.set_default_proxy('socks5h://h', bypass=['localhost'])
        with self.assertRaisesRegex(ValueError, 'bypass: expected .*, not list'), \
                socks.default_proxy('socks5h://h', ['localhost']):
            pass

    def test_wrong_destinations(self):
        """They are shown."""
        for function in socks.create_connection, socks.create_server:
            for pair in (('h', '80'), ('h',), ('h', 70000)):
                with self.subTest(pair), self.assertRaisesRegex(
                        GENERAL, r'\(host, port\) pair: ' + re.escape(repr(pair))):
                    function(pair, proxy='socks5h://127.0.0.1:9')

    def test_urls(self):
        for url, expected in PROXY_URLS:
            with self.subTest(url):
                self.assertEqual(socks.parse_proxy_url(url), expected)

    def test_wrong_urls(self):
        for url, text in WRONG_URLS:
            with self.subTest(url):
                with self.assertRaisesRegex(ValueError, text) as caught:
                    socks.parse_proxy_url(url)
                self.assertNotIn('ppp', str(caught.exception))

    def test_bypass(self):
        for patterns, host, expected in BYPASS:
            with self.subTest(patterns, host=host):
                self.assertEqual(socks.is_bypassed(host, patterns, 80), expected)
        self.assertFalse(socks.is_bypassed('x', 'x:80'))

    def test_environment(self):
        saved = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(saved)))
        for name in ('all_proxy', 'ALL_PROXY', 'no_proxy', 'NO_PROXY'):
            os.environ.pop(name, None)
        self.assertIsNone(socks.proxy_from_environment())
        os.environ['ALL_PROXY'] = 'socks5h://h'
        os.environ['NO_PROXY'] = 'localhost,10.0.0.0/8'
        self.assertEqual(socks.proxy_from_environment(), 'socks5h://h')
        self.assertEqual(socks.proxy_from_environment('example.org'), 'socks5h://h')
        self.assertIsNone(socks.proxy_from_environment('10.1.1.1'))

    def test_all_addresses_of_the_proxy(self):
        """The next one is tried if the proxy cannot be reached, but not if it refuses."""
        calls = []

        def getaddrinfo(host, port, family, kind):          # four arguments, as programs patch it
            calls.append((host, port))
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', each))
                    for each in ports]

        self.addCleanup(setattr, socket, 'getaddrinfo', socket.getaddrinfo)
        accepting = self.scripted(['050100', '0500', IP5, OK5])
        refusing = self.scripted(['050100', '05ff'])
        socket.getaddrinfo = getaddrinfo
        arguments = (('1.2.3.4', 80), PATIENCE, None, socks.SOCKS5, '[proxy.example]')
        ports = [self.refused_port(), accepting.port]
        with socks.create_connection(*arguments) as sock:
            self.check_echo(sock)
        self.assertEqual(calls, [('proxy.example', 1080)])
        ports = [refusing.port, accepting.port]
        with self.assertRaises(AUTH):
            socks.create_connection(*arguments)
        ports = []
        with self.assertRaises(OSError):
            socks.create_connection(*arguments)

    def test_all_addresses_of_a_sockets_proxy(self):
        """As above, in connect(); the socket stays the same to the program."""
        def getaddrinfo(host, port, family, kind):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', each))
                    for each in ports]

        self.change(socket, getaddrinfo=getaddrinfo)
        accepting = self.scripted(['050100', '0500', IP5, OK5])
        refusing = self.scripted(['050100', '05ff'])
        ports = [self.refused_port(), accepting.port]
        for family in (socket.AF_INET, socket.AF_INET6):
            with socks.socksocket(family, proxy='socks5h://proxy.example') as sock:
                number = sock.fileno()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if family == socket.AF_INET:
                    sock.bind(('127.0.0.1', 0))
                sock.setblocking(False)
                sock.connect(('1.2.3.4', 80))
                self.assertEqual((sock.gettimeout(), sock.fileno()), (0, number))
                self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
                sock.settimeout(PATIENCE)
                self.check_echo(sock)
        ports = [refusing.port, accepting.port]
        with socks.socksocket(proxy='socks5h://proxy.example') as sock, self.assertRaises(AUTH):
            sock.connect(('1.2.3.4', 80))
        ports = [self.silent_port(), accepting.port]
        with socks.socksocket(proxy='socks5h://proxy.example') as sock:
            sock.settimeout(0.6)
            sock.connect(('1.2.3.4', 80))
            self.check_echo(sock)
        ports = [self.silent_port(), self.refused_port()]
        with socks.socksocket(proxy='socks5h://proxy.example') as sock:
            sock.settimeout(0.2)
            self.assertEqual(sock.connect_ex(('1.2.3.4', 80)), errno.ECONNREFUSED)

    @needs_ipv6
    def test_source_port(self):
        """It stays the same if the proxy has another family."""
        proxy = self.scripted(['050100', '0500', IP5, OK5], host='::1')
        with socket.socket() as sock:
            sock.bind(('', 0))
            port = sock.getsockname()[1]
        for host in '', '0.0.0.0':
            with socks.create_connection(('1.2.3.4', 80), PATIENCE, (host, port), socket_options=[
                    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)], proxy=self.url(proxy)) as sock:
                self.assertEqual(sock.getsockname()[1], port)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, socks.RESET)

    def test_options_and_source(self):
        proxy = self.scripted(['050100', '0500', IP5, OK5])
        options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                   (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        with socks.create_connection(
                ('1.2.3.4', 80), object(), ('127.0.0.2', 0), 2, b'127.0.0.1', proxy.port,
                socket_options=options) as sock:
            self.assertIsNone(sock.gettimeout())            # a sentinel is no time-out
            self.assertEqual(sock.getsockname()[0], '127.0.0.2')
            for option in options:
                self.assertTrue(sock.getsockopt(*option[:2]))

    def test_another_family_than_the_proxys(self):
        """The descriptor keeps its number, and its options where it is replaced."""
        for host, family in itertools.product(('127.0.0.1', '::1'),
                                              (socket.AF_INET, socket.AF_INET6)):
            with self.subTest(host, family=family):
                possible('::1' if family == socket.AF_INET6 else host)
                proxy = self.scripted(['050100', '0500', IP5, OK5], host=host)
                with socks.socksocket(family, proxy=self.url(proxy)) as sock:
                    number = sock.fileno()
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    sock.settimeout(PATIENCE)
                    sock.connect(('1.2.3.4', 80, 0, 0))
                    self.check_echo(sock)
                    self.assertEqual((sock.fileno(), sock.gettimeout(), sock.getpeername()),
                                     (number, PATIENCE, ('1.2.3.4', 80, 0, 0)))
                    self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    @needs_ipv6
    def test_ipv6_only(self):
        """A default of some systems; a proxy over IPv4 is reached nevertheless."""
        proxy = self.scripted(['050100', '0500', IP5, OK5])
        for local in (), ('::', 0):
            with socks.socksocket(socket.AF_INET6, proxy=self.url(proxy)) as sock:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if local:
                    sock.bind(local)
                sock.connect(('1.2.3.4', 80))
                self.check_echo(sock)

    @unittest.skipUnless(hasattr(socket, 'AF_UNIX'), 'no unix sockets here')
    @unittest.skipUnless(sys.platform == 'linux', 'other systems refuse it, or wait')
    def test_full_queue_of_a_unix_socket(self):
        """The proxy is not reached, although the socket is writable."""
        path = self.place('socket')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(0)
            with self.assertRaises(BlockingIOError):
                while True:
                    sock = self.enter(socket.socket(socket.AF_UNIX))
                    sock.setblocking(False)
                    sock.connect(path)
            with self.assertRaises(socks.ProxyConnectionError):
                socks.create_connection(('1.2.3.4', 80), PATIENCE, proxy='socks5h+unix://' + path)

    def test_unix_socket(self):
        path = self.place('a socket')
        listener = self.enter(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(1)
        url = 'socks5h+unix://' + path.replace(' ', '%20')
        options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),         # as urllib3 has it
                   (socket.IPPROTO_IP, socket.IP_TOS, 8)]
        for connect in (lambda: socks.create_connection(('1.2.3.4', 80), proxy=url,
                                                        socket_options=options),
                        lambda: socks.create_connection(
                            ('1.2.3.4', 80), PATIENCE, ('127.0.0.1', 0), proxy=url),
                        lambda: self.connected_later(url)):
            with Background(self.serve_unix, listener), connect() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option in options:
                    sock.setsockopt(*option)
                    self.assertEqual(sock.getsockopt(*option[:2]), 0)
                self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, 11, 64), b'')
                with self.assertRaises(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, 9999, 1)
                self.check_echo(sock)
                self.assertEqual(sock.getpeername(), ('1.2.3.4', 80))

    def connected_later(self, url):
        sock = socks.socksocket(proxy=url)
        sock.connect(('1.2.3.4', 80))
        return sock

    def serve_unix(self, listener):
        with listener.accept()[0] as sock:
            for expected, answer in (('050100', '0500'), (IP5, OK5)):
                self.assertEqual(sock.recv(100), hexed(expected))
                sock.sendall(hexed(answer))
            sock.sendall(sock.recv(100))

    def test_tls(self):
        """A proxy inside of TLS; the program gets a plain socket, and can use TLS inside again."""
        for scheme, script in (('https', [HEAD + '0d0a', crlf('HTTP/1.1 200 OK\n\n')]),
                               ('socks5h+tls', ['050100', '0500', f'05010003{NAME}0050', OK5]),
                               ('socks4a+tls', ['0401005000000001 00' + NAME[2:] + '00', OK4])):
            with self.subTest(scheme):
                proxy = self.scripted(script, tls=True, then=b'Hello')
                with socks.create_connection(('example.org', 80), PATIENCE,
                                             proxy=self.url(proxy, scheme),
                                             ssl_context=client_context()) as sock:
                    self.assertEqual(sock.recv(5, socket.MSG_WAITALL), b'Hello')
                    self.check_echo(sock, b'0123456789' * 30000)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.assertEqual(sock.getpeername(), ('example.org', 80))

    def test_tls_must_be_trusted(self):
        proxy = self.scripted([], tls=True)
        with self.assertRaises(GENERAL) as caught:
            socks.create_connection(('1.2.3.4', 80), PATIENCE, proxy=self.url(proxy, 'https'))
        self.assertIsInstance(caught.exception.socket_err, ssl.SSLError)

    def test_chain(self):
        """Three proxies: each sees the one before it, the last one asks for the destination."""
        origin = self.origin(echo)
        first, third = self.serve(users={'bob': 's'}), self.serve()
        lines = self.lines
        chain = [self.url(first, 'socks5h', 'bob:s@'), self.url(third, 'socks4a'),
                 self.url(third, 'socks5h')]
        with socks.create_connection(('localhost', origin.port), proxy=chain) as sock:
            self.check_echo(sock)
            self.assertEqual(sock.get_proxy_peername(), tuple(first.server_address))
        eventually(lambda: len({line for line in lines if 'done' in line}) == 3)
        self.assertTrue(any(f'bob SOCKS5 CONNECT {third.server_address}' in line for line in lines))
        with self.assertRaises(socks.SOCKS5Error) as caught:
            socks.create_connection(('127.0.0.1', self.refused_port()), proxy=chain)
        self.assertEqual(caught.exception.reply, Reply.CONNECTION_REFUSED)
        dead = self.refused_port()
        with self.assertRaises(socks.SOCKS5Error) as caught:
            socks.create_connection(('example.org', 1), proxy=[
                self.url(third, 'socks4a'), self.url(first, 'socks5h', 'bob:s@'),
                f'http://bob:secret@127.0.0.1:{dead}'])
        for text in str(caught.exception), repr(caught.exception):      # who said it, and of whom
            self.assertIn('0x05: Connection refused', text)
            self.assertIn(f'SOCKS5 proxy {first.server_address}, ', text)
            self.assertRegex(text, f'target.127.0.0.1:{dead}')
            self.assertNotIn('secret', text)
        self.assertEqual(caught.exception.target, ('127.0.0.1', dead))
        self.assertEqual(caught.exception.proxy, socks.parse_proxy_url(self.url(first)))
        with self.assertRaises(socks.SOCKS4Error):
            socks.create_connection(('localhost', 1), proxy=[
                self.url(third, 'socks4a'), f'socks5://127.0.0.1:{self.refused_port()}'])

    def test_large_and_half_closed(self):
        """32 MiB each way at once, and each direction ends for itself; TlsTest has it in TLS."""
        origin, server = self.origin(), self.serve()
        with socks.create_connection(('127.0.0.1', origin.port), PATIENCE,
                                     proxy=self.url(server)) as sock:
            near, far = Peer(sock), origin.take()
            self.exchange(near, far, 1 << 25)

    def test_bind(self):
        server = self.serve(socks6=True)
        for scheme in ('socks4', 'socks5', 'socks6'):
            with self.subTest(scheme), socks.create_server(
                    ('127.0.0.1', 0), proxy=self.url(server, scheme), timeout=PATIENCE) as waiting:
                peer = self.peer(waiting.getsockname())
                sock, address = waiting.accept()
                with sock:
                    self.assertEqual(address, peer.sock.getsockname())
                    self.assertEqual(sock.getpeername(), address)
                    peer.send(b'early')
                    self.assertEqual(sock.recv(5), b'early')
                    sock.sendall(b'late')
                    self.assertEqual(peer.read(4), b'late')
                with self.assertRaises(OSError):
                    waiting.accept()

    def test_socks6_servers(self):
        """In TLS, in a chain with others, half-closed, by asyncio, as upstream of a server."""
        origin = self.origin(echo)
        server = self.serve(socks6=True, users={'bob': 's'})
        secure = self.serve(socks6=True, users={'bob': 's'}, tls=server_context())
        six = self.url(server, 'socks6h', 'bob:s@')
        other = self.serve(upstream=six)
        for chain in ([six], [self.url(server, 'socks6', 'bob:s@')],
                      [self.url(secure, 'socks6h+tls', 'bob:s@')],
                      [six, self.url(server, user='bob:s@'), self.url(other, 'socks4a')],
                      [self.url(other, 'http'), six], [self.url(other)]):
            with self.subTest(chain), socks.create_connection(
                    ('localhost', origin.port), PATIENCE, proxy=chain,
                    ssl_context=client_context()) as sock:
                self.check_echo(sock, bytes(range(256)) * 999)
                sock.shutdown(socket.SHUT_WR)
                self.assertEqual(sock.recv(1), b'')

        async def talk():
            reader, writer = await socks.open_connection('127.0.0.1', origin.port, proxy=six,
                                                         data=b'data')
            self.assertEqual(await reader.readexactly(4), b'data')
            writer.close()
            writer.transport.abort()
            await asyncio.sleep(0)

        self.run_async(talk())
        with self.assertRaises(AUTH):
            socks.create_connection(('localhost', 1), proxy=self.url(server, 'socks6h'))
        refused = self.refused_port()
        for proxy in six, self.url(other):      # the code of the last proxy is passed on
            with self.assertRaises(socks.SOCKS5Error) as caught:
                socks.create_connection(('127.0.0.1', refused), proxy=proxy)
            self.assertEqual(caught.exception.reply, Reply.CONNECTION_REFUSED)

    def test_only_the_expected_peer_of_socks6(self):
        """A SOCKS6 proxy is not told of it, so the client compares."""
        server = self.serve(socks6=True)
        with socks.create_server(('127.0.0.9', 0), proxy=self.url(server, 'socks6'),
                                 timeout=PATIENCE) as waiting, self.peer(waiting.getsockname()):
            with self.assertRaisesRegex(socks.SOCKS5Error, 'only 127.0.0.1:.* came'):
                waiting.accept()

    def test_bind_in_vain(self):
        server = self.serve(bind_timeout=0.3)
        url = self.url(server)
        with socks.create_server(proxy=url) as waiting:
            waiting.settimeout(0)
            with self.assertRaises(BlockingIOError):
                waiting.accept()
            waiting.settimeout(0.01)
            with self.assertRaises(socket.timeout):
                waiting.accept()
            waiting.settimeout(PATIENCE)
            with self.assertRaises(socks.SOCKS5Error) as caught:
                waiting.accept()
            self.assertEqual(caught.exception.reply, Reply.TTL_EXPIRED)
        for proxy in (None, [], 'http://127.0.0.1:1'):
            with self.assertRaises(socks.ProxyError):
                socks.create_server(proxy=proxy)

    def test_half_a_second_reply(self):
        """What came of it is kept, and nobody waits who does not want to."""
        proxy = self.scripted(['050100', '0500', '05020001 00000000 0000', OK5 + '050000017f'],
                              last=be_silent)
        with socks.create_server(proxy=self.url(proxy), timeout=PATIENCE) as waiting:
            waiting.settimeout(0)
            for _ in range(2):
                with self.assertRaises(BlockingIOError):
                    waiting.accept()
            waiting.settimeout(0.05)
            with self.assertRaises(socket.timeout):
                waiting.accept()
            proxy.peers[0].send(hexed('000001 0009'))
            with waiting.dup() as other:        # which has it, too
                other.settimeout(PATIENCE)
                sock, address = other.accept()
                sock.close()
            self.assertEqual(address, ('127.0.0.1', 9))

    def test_bind_announced_without_an_address(self):
        """Zeros mean the proxy's own address."""
        proxy = self.scripted(['050100', '0500', '05020001 00000000 0000',
                               '05000001 00000000 1d49'])
        with socks.create_server(proxy=self.url(proxy)) as waiting:
            self.assertEqual(waiting.getsockname(), ('127.0.0.1', 7497))


    def test_what_a_proxy_says_of_itself(self):
        """K-05: BND must make sense: a public proxy is at no private address, and one elsewhere at
        none of ours."""
        for proxy, host, expected in (
                ('127.0.0.1', '127.0.0.1', True), ('127.0.0.1', '127.0.0.2', True),
                ('192.168.1.9', '127.0.0.1', False), ('192.168.1.9', '127.8.8.8', False),
                ('192.168.1.9', '::1', False), ('192.168.1.9', '169.254.169.254', False),
                ('192.168.1.9', '64:ff9b::7f00:1', False), ('192.168.1.9', '2002:7f00:1::', False),
                ('192.168.1.9', '10.0.0.1', True), ('192.168.1.9', '8.8.8.8', True),
                ('192.168.1.9', '0.0.0.0', False), ('192.168.1.9', '224.0.0.1', False),
                ('8.8.8.8', '8.8.4.4', True), ('8.8.8.8', '192.168.1.1', False),
                ('8.8.8.8', '8.8.8.8', True), ('fe80::1', 'fe80::2', True),
                ('fe80::1', '::1', False), ('2001:db8::1', 'fe80::1', False),
                (None, '127.0.0.1', False), (None, '10.0.0.1', True), (None, '8.8.8.8', True)):
            with self.subTest(proxy=proxy, host=host):
                self.assertEqual(socks.is_believable(host, proxy), expected)

    def asked_names(self):
        """A list of the names that are looked up from here on."""
        asked, look_up = [], socket.getaddrinfo

        def getaddrinfo(host, *args, **options):
            asked.append(host)
            return look_up(host, *args, **options)

        self.change(socket, getaddrinfo=getaddrinfo)
        return asked

    def test_names_of_a_proxys_choosing(self):
        """They are not looked up; the proxy is where it is."""
        asked = self.asked_names()
        name = '03 09 6c6f63616c686f7374'
        for command, kind in ((2, socket.SOCK_STREAM), (3, socket.SOCK_DGRAM)):
            script = ['050100', '0500', f'05{command:02x}0001 00000000', f'050000{name} 1d49']
            proxy = self.scripted(script, last=be_silent)
            if command == 2:
                with socks.create_server(proxy=self.url(proxy)) as waiting:
                    self.assertEqual(waiting.getsockname(), ('127.0.0.1', 0x1d49))
            else:
                with socks.socksocket(type=kind, proxy=self.url(proxy)) as sock:
                    sock.bind(('127.0.0.1', 0))
                    self.assertEqual(socket.socket.getpeername(sock), ('127.0.0.1', 0x1d49))
        self.assertNotIn('localhost', asked)
        self.assertNotIn(b'localhost', asked)

    def test_the_last_proxy_of_a_chain(self):
        """Nothing is known of its address but what is in the chain."""
        name = '0a 6c6173742e70726f7879'                    # last.proxy
        for bnd, expected in (('01 00000000', 'last.proxy'), ('01 7f000001', 'last.proxy'),
                              ('03 0161', 'last.proxy'), ('01 0a000001', '10.0.0.1')):
            proxy = self.scripted(['050100', '0500', f'05010003 {name} 0438', OK5, '050100', '0500',
                                   '05020001 00000000 0000', f'050000{bnd} 1d49'], last=be_silent)
            with socks.create_server(
                    proxy=[self.url(proxy), 'socks5h://last.proxy']) as waiting:
                self.assertEqual(waiting.getsockname(), (expected, 0x1d49))

    def test_secrets_in_messages(self):
        for message in (Credentials(b'USER', b'SECRET'),
                        socks.HttpConnect(Address('h', 80), b'USER:SECRET')):
            for text in repr(message), str(message), f'{message}', repr([message]):
                self.assertNotIn('SECRET', text)
                self.assertNotIn('USER', text)

    def test_source_of_asyncio(self):
        proxy = self.scripted(['050100', '0500', IP5, OK5], last=be_silent)
        port = unused_port()

        async def connect(address):
            _, writer = await socks.open_connection('1.2.3.4', 80, proxy=self.url(proxy),
                                                    local_addr=address)
            self.assertEqual(writer.get_extra_info('sockname'), address)
            self.assertEqual(proxy.peers[-1].sock.getpeername(), address)
            writer.close()

        loop = asyncio.new_event_loop()
        self.addCleanup(loop.close)
        with concurrent.futures.ThreadPoolExecutor() as executor:
            loop.set_default_executor(executor)
            loop.run_until_complete(connect(('127.0.0.1', port)))


class Stepwise(Origin):
    """A SOCKS5 server that takes what one recv() gives for one message, as microsocks does: it
    loses what a client sends at once.  `first` is what it does with the first connection."""

    def __init__(self, first=None, password=False):
        self.delivered, self.messages = [], []

        def function(peer):
            messages = []
            self.messages.append(messages)
            if first and messages is self.messages[0]:
                return first(peer)
            with peer:
                answers = ['0502', '0100', OK5] if password else ['0500', OK5]
                for answer in answers:
                    messages.append(peer.sock.recv(1024))
                    if not messages[-1]:
                        return
                    peer.send(hexed(answer))
                self.delivered.append(peer.read(4))
                peer.send(b'yes!')

        super().__init__(function)


def hangs_up(*answers, reset=False):
    """What a `Stepwise` does: read all that comes at once, answer, and leave or reset."""
    def first(peer):
        with peer:
            peer.sock.recv(1024)
            for answer in answers:
                peer.send(hexed(answer))
            if reset:
                peer.reset()
    return first


class OptimisticTest(ClientCase):
    """All messages at once."""

    LOGIN = '01 03626f62 06736563726574'        # bob, secret

    def setUp(self):
        super().setUp()
        self.addCleanup(socks.Flight.known.clear)

    def impatient(self, seconds=0.2):
        self.change(socks.Flight, PATIENCE=seconds)

    def test_one_segment(self):
        """The proxy answers only after it has read all of it."""
        next_proxy = '03 05 6e2e61626301bb'                             # n.abc:443
        data = b'data'.hex()
        cases = [
            ('no login', ['socks5h://{}'], '050100' + IP5, '0500' + OK5, False),
            ('login', ['socks5h://bob:secret@{}'], '050102' + self.LOGIN + IP5,
             '05020100' + OK5, False),
            ('login and data', ['socks5h://bob:secret@{}'],
             '050102' + self.LOGIN + IP5 + data, '05020100' + OK5, True),
            ('login at tor', ['socks5h://bob:secret@{}'], '050102' + self.LOGIN + IP5,
             '0100' + OK5, False),
            ('looked up here', ['socks5://{}'], '050100' + IP5, '0500' + OK5, False),
            ('SOCKS4a', ['socks4a://bob@{}'], '04010050010203 04626f6200' + data, OK4, True),
            ('two', ['socks5h://{}', 'socks5h://bob:secret@n.abc:443'],
             '050100 050100' + next_proxy + '050102' + self.LOGIN + IP5 + data,
             '0500' + OK5 + '05020100' + OK5, True),
            ('three', ['socks4a://{}', 'socks4a://n.abc:443', 'socks5h://n.abc:443'],
             '040101bb00000001006e2e61626300' * 2 + '050100' + IP5 + data,
             OK4 * 2 + '0500' + OK5, True),
            ('SOCKS6', ['socks6h://bob:secret@{}'],
             '0601 0014 0050 00 01 01020304' + BOB_6 + data,
             '0600 0008 0004 0008 02 01 00 00' + OK6, True),
            ('SOCKS6 and SOCKS5', ['socks6h://{}', 'socks5h://n.abc:443'],
             '0601 0000 01bb 00 03 07 6e2e616263 0000 050100' + IP5 + data,
             '0600 0000' + OK6 + '0500' + OK5, True),
            ('HTTP behind it', ['socks4a://{}', 'http://n.abc:443'],
             '040101bb00000001006e2e61626300' + crlf(
                 'CONNECT 1.2.3.4:80 HTTP/1.1\nHost: 1.2.3.4:80\n\n'),
             OK4 + crlf('HTTP/1.1 200 OK\n\n'), False)]
        for (name, chain, sent, answers, early), step, by_url in itertools.product(
                cases, (None, 1), (True, False)):
            with self.subTest(name, step=step, by_url=by_url):
                proxy = self.scripted([sent, answers], step, then=b'Hello')
                urls = [url.format(Address(*proxy.server_address)) + '?optimistic=1' * by_url
                        for url in chain]
                for hop in socks.parse_chain(urls) if name != 'login and data' else ():
                    hop = hop._replace(type=hop.type | socks.OPTIMISTIC)
                    socks.Flight.note(hop, True)
                with socks.create_connection(
                        ('1.2.3.4', 80), PATIENCE, proxy=urls, optimistic=not by_url,
                        data=b'data' * early) as sock:
                    self.assertEqual(Peer(sock).read(5), b'Hello')
                    self.check_echo(sock)

    def test_what_ends_it(self):
        """What must wait: whatever is behind HTTP, not optimistic, large or looked up here."""
        step = ['0401005001020304 00', OK4]
        hop = '0401 {} 00000001006e00'.format('0438')
        head = crlf('CONNECT 1.2.3.4:80 HTTP/1.1\nHost: 1.2.3.4:80\n\n')
        ok = crlf('HTTP/1.1 200 OK\n\n')
        login = '050102' + self.LOGIN
        for name, chain, data, script in (
                ('HTTP', ['http://{}?optimistic=1'], b'data', [head, ok, b'data'.hex(), '']),
                ('the second is not', ['socks4a://{}?optimistic=1', 'socks4a://n'], b'data',
                 [hop, OK4, *step, b'data'.hex(), '']),
                ('the first is not', ['socks4a://{}', 'socks4a://n?optimistic=1'], b'data',
                 [hop, OK4, *step, b'data'.hex(), '']),
                ('large', ['socks5h://bob:secret@{}?optimistic=1'], b'x' * 1024,
                 [login + IP5, '05020100' + OK5, '78*1024', '']),
                ('looked up here', ['socks4a://{}?optimistic=1', 'socks4://n?optimistic=1'],
                 b'', [hop, OK4, '0401005001020304 00', OK4])):
            with self.subTest(name):
                proxy = self.scripted(script)
                urls = [url.format(Address(*proxy.server_address)) for url in chain]
                with socks.create_connection(('1.2.3.4', 80), PATIENCE, proxy=urls,
                                             data=data) as sock:
                    self.check_echo(sock)

    def test_socks6(self):
        """Its proxies always get all at once, and the data if there is any; others do not."""
        hop = '0601 0000 0438 00 03 03 6e0000'
        for chain, script in (
                (['socks6h://{}'], [IP6 + b'data'.hex(), '0600 0000' + OK6]),
                (['socks6h://{}', 'socks6h://n'], [hop + IP6 + b'data'.hex(),
                                                   ('0600 0000' + OK6) * 2]),
                (['socks6h://{}', 'socks4a://n'], [
                    hop, '0600 0000' + OK6, '0401005001020304 00', OK4, b'data'.hex(), ''])):
            proxy = self.scripted(script)
            urls = [url.format(Address(*proxy.server_address)) for url in chain]
            with self.subTest(chain), socks.create_connection(
                    ('1.2.3.4', 80), PATIENCE, proxy=urls, data=b'data') as sock:
                self.check_echo(sock)

    def test_in_tls(self):
        proxy = self.scripted(['050102' + self.LOGIN + IP5 + b'data'.hex(), '05020100' + OK5],
                              tls=True)
        with socks.create_connection(
                ('1.2.3.4', 80), PATIENCE, proxy=self.url(proxy, 'socks5h+tls', 'bob:secret@'),
                ssl_context=client_context(), optimistic=True, data=b'data') as sock:
            self.check_echo(sock)

    def test_first_data_of_a_socket(self):
        """Both calls connect, as with TCP Fast Open."""
        for call in (lambda sock: sock.sendto(b'data', socks.MSG_FASTOPEN, ('1.2.3.4', 80)),
                     lambda sock: sock.sendmsg([b'da', b'ta'], [], 0, ('1.2.3.4', 80))):
            for url in 'socks5h://bob:secret@{}?optimistic=1', 'socks5h://{}':
                with self.subTest(url), socks.socksocket() as sock:
                    sent = ['050102' + self.LOGIN + IP5 + b'data'.hex(), '05020100' + OK5
                            ] if '?' in url else ['050100', '0500', IP5, OK5, b'data'.hex(), '']
                    proxy = self.scripted(sent)
                    sock.settimeout(PATIENCE)
                    sock.set_proxy(url.format(Address(*proxy.server_address)))
                    self.assertEqual(call(sock), 4)
                    self.check_echo(sock)
                    self.assertEqual(sock.getpeername(), ('1.2.3.4', 80))

    def test_without_a_proxy(self):
        """The first data are sent just the same."""
        origin = self.origin(echo)
        with socks.create_connection(('127.0.0.1', origin.port), PATIENCE, proxy='',
                                     optimistic=True, data=b'data') as sock:
            self.assertEqual(Peer(sock).read(4), b'data')

    def test_asyncio(self):
        async def talk(port, **options):
            reader, writer = await socks.open_connection(
                '127.0.0.1', port, timeout=PATIENCE, optimistic=True, data=b'data', **options)
            self.assertEqual((await reader.readexactly(4)).lower(), b'data')
            writer.close()
            writer.transport.abort()
            await asyncio.sleep(0)

        origin, inside = self.origin(echo), self.origin(serve_tls)
        request = '05010001 7f000001 %04x' % origin.port
        proxy = self.scripted(['050102' + self.LOGIN + request + b'data'.hex(),
                               '05020100' + OK5 + b'data'.hex()])
        self.run_async(talk(origin.port, proxy=self.url(proxy, user='bob:secret@')))
        self.run_async(talk(origin.port, proxy=[]))
        self.run_async(talk(inside.port, proxy=self.url(self.serve()), ssl=client_context(),
                            server_hostname='localhost'))

    def test_a_server_in_between(self):
        """It speaks so to the proxies of its settings."""
        origin = self.origin(echo)
        proxy = self.scripted(['050102' + self.LOGIN + '05010001 7f000001 %04x' % origin.port,
                               '05020100' + OK5])
        url = self.url(proxy, user='bob:secret@') + '?optimistic=1'
        server = self.serve(upstream=url)
        with Peer(server.server_address) as peer:
            self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)
            self.check_echo(peer.sock)
        proxy = self.enter(Stepwise(hangs_up('05ff')))
        server = self.serve(upstream=self.url(proxy) + '?optimistic=1')
        with Peer(server.server_address) as peer:
            self.assertEqual(peer.connect('127.0.0.1', 1).reply, 0)

    def test_where_it_can_be_said(self):
        proxy = (socks.SOCKS5 | socks.OPTIMISTIC, 'h', None, True, None, None)
        self.assertEqual(socks.parse_proxy_url('socks5h://h?optimistic=1'), proxy)
        self.assertEqual(str(socks.parse_proxy_url('socks5h://h?optimistic=1')),
                         'SOCKS5 proxy h:1080')
        with socks.socksocket() as sock:
            for args, options in ((('socks5h://h?optimistic=1',), {}), (proxy[:2], {}),
                                  (('socks5h://h',), {'optimistic': True}),
                                  ((socks.SOCKS5, 'h'), {'optimistic': True})):
                sock.set_proxy(*args, **options)
                self.assertEqual(sock.proxy, proxy)
            sock.set_proxy(['socks5h://h', 'http://h'], optimistic=True)
            self.assertEqual([each.type & socks.OPTIMISTIC for each in sock._chain()], [64, 64])
            sock.set_proxy(optimistic=True)
            self.assertEqual(sock.proxy[0], None)
        self.assertEqual(socks.parse_proxy_url('https://h?optimistic=1').sure_port, 443)

    def test_when_data_goes_along(self):
        """To a proxy without a password, after it has coped once."""
        proxy, sent = self.origin(), hexed('050100' + IP5)

        def connect():
            with socks.create_connection(('1.2.3.4', 80), PATIENCE, optimistic=True, data=b'data',
                                         proxy=self.url(proxy)) as sock:
                return Peer(sock).rest()

        for early in False, True:
            with Background(connect) as job, proxy.take() as peer:
                self.assertEqual(peer.read(len(sent)), sent)
                if early:
                    self.assertEqual(peer.read(4), b'data')
                self.assertEqual(ready([peer.sock], [], 0.02), [])
                peer.send(hexed('0500' + OK5))
                if not early:
                    self.assertEqual(peer.read(4), b'data')
                peer.send(b'yes!')
            self.assertEqual(job.result(), b'yes!')

    def test_slow_connections(self):
        """Silence after the login, with data: the proxy is still connecting."""
        self.impatient(0.3)

        def first(peer):
            peer.sock.recv(1024)
            peer.send(hexed('05020100'))
            self.assertEqual(ready([peer.sock], [], 0.45), [])
            peer.send(hexed(OK5))

        proxy = self.origin(first)
        with socks.create_connection(('1.2.3.4', 80), PATIENCE, optimistic=True, data=b'data',
                                     proxy=self.url(proxy, user='bob:secret@')) as sock:
            self.assertEqual(sock.recv(1), b'')
        self.assertEqual(len(proxy.peers), 1)

    def test_servers_that_cope(self):
        """Ours, with a password, in TLS, as a chain, by BIND and for datagrams."""
        origin = self.origin(echo)
        server = self.serve(users={'bob': 's'})
        url = self.url(server, user='bob:s@') + '?optimistic=1'
        for chain in url, [url] * 3:
            with socks.create_connection(('localhost', origin.port), PATIENCE, proxy=chain,
                                         data=b'data') as sock:
                self.assertEqual(Peer(sock).read(4), b'data')
        with self.assertRaises(socks.SOCKS5Error) as caught:
            socks.create_connection(('127.0.0.1', self.refused_port()), PATIENCE, proxy=[url, url])
        self.assertEqual(caught.exception.reply, Reply.CONNECTION_REFUSED)
        with self.assertRaisesRegex(AUTH, 'authentication failed'):
            socks.create_connection(('127.0.0.1', origin.port), PATIENCE,
                                    proxy=url.replace('bob:s', 'bob:x'), data=b'data')
        with socks.create_server(('127.0.0.1', 0), proxy=url, timeout=PATIENCE) as waiting:
            with self.peer(waiting.getsockname()):
                waiting.accept()[0].close()
        target = self.enter(Echo())
        with socks.socksocket(type=socket.SOCK_DGRAM, proxy=url) as sock:
            sock.settimeout(PATIENCE)
            sock.sendto(b'x', tuple(target.address))
            self.assertEqual(sock.recv(100), b'E:x')
        self.assertEqual(set(socks.Flight.known.values()), {0})
        self.assertEqual(len(origin.peers), 2)

    def check_again(self, server, data, user=''):
        """The connection is made a second time, and works; the third is made in steps at once."""
        for count in 2, 3:
            with socks.create_connection(('1.2.3.4', 80), PATIENCE, data=data,
                                         proxy=self.url(server, user=user) + '?optimistic=1'
                                         ) as sock:
                sock.sendall(b'data'[len(data):])
                self.assertEqual(Peer(sock).read(4), b'yes!')
            self.assertEqual(server.delivered, [b'data'] * (count - 1))
            self.assertEqual(len(server.messages), count)
        self.assertEqual(server.messages[-1][0], b'\5\2\0\2' if user else b'\5\1\0')

    def test_servers_that_do_not_cope(self):
        self.impatient()
        for name, first, password, cases in (
                ('loses the rest', None, False, 'nd'), ('loses the rest', None, True, 'nd'),
                ('closes', hangs_up(), True, 'nd'), ('closes later', hangs_up('0502'), True, 'nd'),
                ('resets', hangs_up(reset=True), False, 'n'),
                ('chooses none', hangs_up('05ff'), True, 'nd'),
                ('chooses none, resets', hangs_up('05ff', reset=True), True, 'nd'),
                ('chooses another', hangs_up('0500'), True, 'nd'),
                ('something else', hangs_up('48'), True, 'n'),
                ('is silent', lambda peer: peer.rest() and peer.sock.close(), False, 'nd')):
            for case in cases:
                with self.subTest(name, password=password, data=case == 'd'):
                    server = self.enter(Stepwise(first, password))
                    self.check_again(server, b'data' if case == 'd' else b'',
                                     'bob:secret@' if password else '')

    def test_never_twice(self):
        """With data, an error if it may have come to the target; but the next connection works."""
        self.impatient()
        hold = threading.Event()
        self.addCleanup(hold.set)
        for name, first in (
                ('resets', hangs_up(reset=True)), ('resets later', hangs_up('0502', reset=True)),
                ('half an answer', hangs_up('050201')), ('nonsense', hangs_up('4854')),
                ('closes after the login', hangs_up('05020100')),
                ('half a reply', hangs_up('05020100' + OK5[:8])),
                ('is silent', lambda peer: hold.wait(PATIENCE)),
                ('connects late', lambda peer: (peer.rest(), peer.send(hexed('05020100' + OK5)),
                                                hold.wait(PATIENCE)))):
            with self.subTest(name):
                hold.clear()
                server = self.enter(Stepwise(first, True))
                url = self.url(server, user='bob:secret@') + '?optimistic=1'
                with self.assertRaises(GENERAL) as caught:
                    socks.create_connection(('1.2.3.4', 80), PATIENCE, proxy=url, data=b'data')
                hold.set()
                self.assertEqual(isinstance(caught.exception, socket.timeout),
                                 name in ('is silent', 'connects late'))
                self.assertEqual(len(server.messages), 1)
                with socks.create_connection(('1.2.3.4', 80), PATIENCE, proxy=url,
                                             data=b'data') as sock:
                    self.assertEqual(Peer(sock).read(4), b'yes!')
        server = self.enter(Stepwise(hangs_up('05020100' + OK5)))
        url = self.url(server, user='bob:secret@') + '?optimistic=1'
        with socks.create_connection(('1.2.3.4', 80), PATIENCE, data=b'data', proxy=url) as sock:
            self.assertEqual(sock.recv(1), b'')
        self.assertEqual(len(server.messages), 1)

    def test_refusals_are_final(self):
        for answers, error in (('05020101', AUTH), ('0101', AUTH),
                               ('05020100 050500', socks.SOCKS5Error)):
            for data in b'', b'data':
                server = self.enter(Stepwise(hangs_up(answers), True))
                with self.assertRaises(error):
                    socks.create_connection(
                        ('1.2.3.4', 80), PATIENCE, data=data,
                        proxy=self.url(server, user='bob:secret@') + '?optimistic=1')
                self.assertEqual(len(server.messages), 1)


class DatagramClientTest(ClientCase):
    """UDP."""

    def relayed(self, family=socket.AF_INET, **settings):
        """A UDP socket with a proxy."""
        host = '::1' if family == socket.AF_INET6 else '127.0.0.1'
        server = self.serve(host=host, **settings)
        sock = self.enter(socks.socksocket(family, socket.SOCK_DGRAM, proxy=self.proxy(server)))
        sock.settimeout(PATIENCE)
        return sock

    def proxy(self, server):
        return self.url(server)

    def test_datagrams(self):
        """Every call that sends and every one that receives."""
        target, other = self.enter(Echo()), self.enter(Echo(prefix=b'O:'))
        sock = self.relayed()
        self.assertEqual(sock.sendto(b'one', target.address), 3)
        self.assertEqual(sock.recvfrom(100), (b'E:one', tuple(target.address)))
        self.assertEqual(sock.sendto(memoryview(b'two'), 0, ('localhost', target.address.port)), 3)
        self.assertEqual(sock.recvfrom(3), (b'E:t', tuple(target.address)))
        with self.assertRaises(TypeError):
            sock.sendmsg()
        with self.assertRaises(OSError) as caught:
            sock.send(b'nowhere')
        self.assertEqual(caught.exception.errno, errno.EDESTADDRREQ)
        sock.connect(target.address)
        self.assertEqual(sock.getpeername(), tuple(target.address))
        self.assertEqual(sock.get_proxy_sockname(), ('0.0.0.0', 0))
        self.assertEqual(sock.send(b'three'), 5)
        self.assertEqual(sock.recv(100), b'E:three')
        self.assertIsNone(sock.sendall(bytearray(b'four')))
        buffer = bytearray(10)
        self.assertEqual((sock.recv_into(buffer), buffer[:6]), (6, b'E:four'))
        self.assertEqual(sock.sendmsg([b'fi', b've']), 4)
        self.assertEqual(sock.recvfrom_into(buffer, 3), (3, tuple(target.address)))
        sock.sendmsg([b'six'], [], 0, other.address)        # its answer is not from the peer
        sock.send(b'')
        self.assertEqual(sock.recvmsg(100), (b'E:', [], 0, tuple(target.address)))
        sock.send(b'seven')
        first, second = bytearray(3), bytearray(2)
        self.assertEqual(sock.recvmsg_into([first, second])[::2], (5, socket.MSG_TRUNC))
        self.assertEqual((first, second), (b'E:s', b'ev'))
        sock.connect(('0.0.0.0', 0))
        sock.sendto(b'x' * 60000, other.address)
        if sock.recv(65536, socket.MSG_PEEK) == b'O:six':       # it was late
            sock.recv(65536)
        self.assertEqual(sock.recv(65536, socket.MSG_PEEK)[:3], b'O:x')
        self.assertEqual(len(sock.recv(65536)), 60002)

    def test_timeout_during_a_flood(self):
        """The timeout holds while datagrams come that are not from the peer."""
        peer, other = self.enter(Echo()), self.enter(Echo(prefix=b'O:'))
        sock = self.relayed()
        sock.connect(peer.address)
        sock.send(b'x')
        self.assertEqual(sock.recv(100), b'E:x')
        sock.sendmsg([b'x'], [], 0, other.address)
        self.assertTrue(ready([sock], [], PATIENCE))
        sock.send(b'x')
        sock.settimeout(1e-6)
        with self.assertRaises(socket.timeout):
            sock.recv(100)
        sock.settimeout(PATIENCE)
        self.assertEqual(sock.recv(100), b'E:x')

    def test_not_connected_to_the_relay(self):
        """As far as a program can see; asyncio looks."""
        sock = self.relayed()
        sock.bind(('127.0.0.1', 0))
        with self.assertRaises(OSError) as caught:
            sock.getpeername()
        self.assertEqual(caught.exception.errno, errno.ENOTCONN)

    def test_bound_to_one_of_several_addresses(self):
        """The proxy serves only datagrams from where the control connection comes from."""
        server, target = self.serve(), self.enter(Echo())
        for family, host in ((socket.AF_INET, '127.0.0.5'), (socket.AF_INET6, '::ffff:127.0.0.5')):
            sock = self.enter(socks.socksocket(family, socket.SOCK_DGRAM, proxy=self.url(server)))
            sock.settimeout(PATIENCE)
            try:
                sock.bind((host, 0))
            except socks.ProxyError:
                raise
            except OSError:
                self.skipTest(f'{host} is not an address of this host')
            sock.sendto(b'x', target.address)
            self.assertEqual(sock.recv(10), b'E:x')
            self.assertEqual(sock._proxyconn.getsockname()[0], '127.0.0.5')

    def test_shut_down(self):
        """Who waits returns, as in stock."""
        for index in (0, 1):            # also by a duplicate
            sock = self.relayed()
            sock.bind(('127.0.0.1', 0))
            sock.settimeout(None)
            waiting = Background(sock.recvfrom, 10)
            time.sleep(0.05)
            with sock.dup() as other:
                (sock, other)[index].shutdown(socket.SHUT_RDWR)
                self.assertEqual(waiting.result(), (b'', None))

    def test_duplicate(self):
        """It sends through the relay, too, and keeps the association."""
        target, sock = self.enter(Echo()), self.relayed()
        sock.sendto(b'x', target.address)
        self.assertEqual(sock.recv(10), b'E:x')
        with sock.dup() as other:
            sock.close()
            sock.close()                # counts once
            other.sendto(b'y', target.address)
            self.assertEqual(other.recvfrom(10), (b'E:y', tuple(target.address)))
        self.assertEqual(len(set(target.senders)), 1)

    def test_bypass(self):
        """In any order, some hosts directly and some through the relay, on one socket."""
        server, target, direct = self.serve(), self.enter(Echo()), self.enter(Echo('127.0.0.2'))

        def new():
            with socks.default_proxy(self.url(server), bypass='127.0.0.2'):
                sock = self.enter(socks.socksocket(type=socket.SOCK_DGRAM))
            sock.settimeout(PATIENCE)
            return sock

        for order in (target, direct, target), (direct, target, direct):
            sock = new()
            for echo in order:
                for send in (lambda: sock.sendto(b'x', echo.address),
                             lambda: sock.sendmsg([b'x'], [], 0, echo.address)):
                    send()
                    answer = sock.recvfrom(10)
                    self.assertEqual((echo.senders[-1][1] == sock.getsockname()[1], answer),
                                     (echo is direct, (b'E:x', tuple(echo.address))))
        sock = new()
        sock.bind(('127.0.0.1', 0))
        sock.connect(target.address)
        sock.send(b'x')
        self.assertEqual(sock.recv(10), b'E:x')
        self.assertEqual(sock.getpeername(), tuple(target.address))
        sock.sendto(b'x', direct.address)
        sock.send(b'y')                 # only the peer's
        self.assertEqual(sock.recv(10), b'E:y')
        sock.connect(direct.address)
        self.assertEqual(sock.getpeername(), tuple(direct.address))
        sock.send(b'z')
        answers = iter(lambda: sock.recvfrom(10), None)         # that to x may be late
        self.assertEqual(next(answer for answer in answers if answer[0] != b'E:x'),
                         (b'E:z', tuple(direct.address)))
        with self.assertRaises(OSError) as caught:
            sock.connect(target.address)
        self.assertEqual(caught.exception.errno, errno.EISCONN)

    def test_datagrams_wait(self):
        target, sock = self.enter(Echo()), self.relayed()
        sock.bind(('127.0.0.1', 0))
        with self.assertRaises(OSError) as caught:
            sock.bind(('127.0.0.1', 0))
        self.assertEqual(caught.exception.errno, errno.EINVAL)
        sock.settimeout(0.05)
        with self.assertRaises(socket.timeout):
            sock.recv(10)
        sock.setblocking(False)
        with self.assertRaises(BlockingIOError):
            sock.recvfrom(10)
        sock.sendto(b'x', target.address)
        self.assertTrue(ready([sock], [], PATIENCE))
        self.assertEqual(sock.recv(10), b'E:x')

    def test_datagrams_over_ipv6(self):
        """An IPv6 socket has IPv6 addresses, 4-tuples, and may have an IPv4 proxy, and back."""
        six, four = self.enter(Echo('::1')), self.enter(Echo())
        for family, host in ((socket.AF_INET6, '::1'), (socket.AF_INET6, '127.0.0.1'),
                             (socket.AF_INET, '::1')):
            proxy = self.proxy(self.serve(host=host))
            with self.subTest(host, family=family), \
                    socks.socksocket(family, socket.SOCK_DGRAM, proxy=proxy) as sock:
                sock.settimeout(PATIENCE)
                rest = (0, 0) if family == socket.AF_INET6 else ()
                sock.sendto(b'x', ('::1', six.address.port, 0, 0))
                self.assertEqual(sock.recvfrom(10), (b'E:x', (*six.address, *rest)))
                mapped = '::ffff:127.0.0.1' if rest else '127.0.0.1'
                sock.sendto(b'y', (mapped, four.address.port))
                self.assertEqual(sock.recvfrom(10), (b'E:y', (mapped, four.address.port, *rest)))
                self.assertEqual((sock.family, len(sock.getsockname())), (family, 2 + len(rest)))
                if family == socket.AF_INET:
                    sock.set_proxy()
                    sock.connect(four.address)
                    sock.send(b'z')
                    self.assertEqual(sock.recv(10), b'E:z')
                    self.assertEqual(four.senders[-1], sock.getsockname())

    @needs_ipv6
    def test_proxy_of_both_families(self):
        """It is reached over that of the socket."""
        target = self.enter(Echo())
        servers = [self.serve(host=host) for host in ('::1', '127.0.0.1')]
        found = [(socks.family_of(server.server_address[0]), socket.SOCK_STREAM, 6, '',
                  server.server_address) for server in servers]
        self.change(socket, getaddrinfo=lambda *_: order)
        for order in found, found[::-1]:
            for family, host in (socket.AF_INET6, '::1'), (socket.AF_INET, '127.0.0.1'):
                with self.subTest(host, order=order), socks.socksocket(
                        family, socket.SOCK_DGRAM, proxy='socks5h://proxy.example') as sock:
                    sock.settimeout(PATIENCE)
                    sock.sendto(b'x', target.address)
                    self.assertEqual(sock.recv(10), b'E:x')
                    self.assertEqual(sock.get_proxy_peername()[0], host)

    @needs_ipv6
    def test_ipv6_only(self):
        """A default of some systems; a proxy over IPv4 is reached nevertheless."""
        target, proxy = self.enter(Echo()), self.proxy(self.serve())
        for bound in False, True:
            with socks.socksocket(socket.AF_INET6, socket.SOCK_DGRAM, proxy=proxy) as sock:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.settimeout(PATIENCE)
                if bound:
                    sock.bind(('::', 0))
                sock.sendto(b'x', target.address)
                self.assertEqual(sock.recvfrom(10), (b'E:x', (
                    '::ffff:127.0.0.1', target.address.port, 0, 0)))
                self.assertEqual((sock.family, len(sock.getsockname())), (socket.AF_INET6, 4))

    def test_sizes(self):
        """Wrong ones are an error before a datagram is taken."""
        target, sock, buffer = self.enter(Echo()), self.relayed(), bytearray(3)
        sock.sendto(b'data', target.address)
        for function, *arguments in ((sock.recv, -1), (sock.recvfrom, -1), (sock.recvmsg, -1),
                                     (sock.recv_into, buffer, -1), (sock.recv_into, buffer, 4),
                                     (sock.recvfrom_into, buffer, 4)):
            with self.assertRaises(ValueError):
                function(*arguments)
        flag = socket.MSG_TRUNC if sys.platform == 'linux' else 0       # for the whole length
        self.assertEqual((sock.recv_into(buffer, 0, flag), buffer), (6 if flag else 3, b'E:d'))

    def test_association_ends(self):
        sock = self.relayed(udp_timeout=0.2)
        sock.bind(('127.0.0.1', 0))
        with self.assertRaisesRegex(GENERAL, 'ended the UDP association'):
            sock.recv(10)
        with self.assertRaisesRegex(GENERAL, 'ended the UDP association'):
            sock.sendto(b'x', ('127.0.0.1', 9))

    def test_announced_relays(self):
        """K-04, K-05: BND says no host; the relay is on the proxy.  Fragments are dropped."""
        for answer in ('0500000301 00 {port}', '05000001 00000000 {port}',
                       '05000003 09 6c6f63616c686f7374 {port}', '05000001 7f000001 {port}'):
            with self.subTest(answer), \
                    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay, \
                    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                relay.bind(('127.0.0.1', 0))
                relay.settimeout(PATIENCE)
                sender.bind(('127.0.0.1', 0))
                hint = '050300 01 00000000 %04x' % sender.getsockname()[1]
                sender.close()
                proxy = self.scripted(['050100', '0500', hint, answer.replace(
                    '{port}', '%04x' % relay.getsockname()[1])])
                sock = self.enter(socks.socksocket(type=socket.SOCK_DGRAM, proxy=self.url(proxy)))
                sock.settimeout(PATIENCE)
                sock.bind(('', int(hint[-4:], 16)))
                sock.sendto(b'x', ('1.2.3.4', 5))
                data, source = relay.recvfrom(100)
                self.assertEqual(data, hexed('00000001 01020304 0005 78'))
                for wrong in ('', '0000', '00000002', '00000101 01020304 0005 78'):
                    relay.sendto(hexed(wrong), source)
                relay.sendto(hexed('00000003 0161 0005 79'), source)
                self.assertEqual(sock.recvfrom(10), (b'y', ('a', 5)))
        if has_family(socket.AF_INET6):
            with socks.socksocket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                self.assertEqual(sock._own_tuple(Address('a', 5)), ('a', 5, 0, 0))


def accept_datagrams(last):
    """What a proxy does that supports UDP_IN_TCP, but not UDP_ASSOCIATE: last(peer) comes then."""
    def serve(peer):
        peer.read(3)
        peer.send(b'\5\0')
        command = peer.read(10)[1]
        peer.send(hexed('050000 01 00000000 0000' if command == 5 else '050700 01 00000000 0000'))
        if command == 5:
            last(peer)
    return serve


# The client's messages to 1.2.3.4:53 and to a name, with one byte of data.
TO_IP, TO_NAME = '0001 0a 01 01020304 0035 78', '0001 10 03 09 6c6f63616c686f7374 0035 79'


class DatagramsInTcpTest(DatagramClientTest):
    """UDP inside of TCP, through a chain of two proxies or as a test says."""
    # The datagrams of these are beside the connection.
    test_bound_to_one_of_several_addresses = test_bypass = test_announced_relays = None
    test_proxy_of_both_families = None

    def proxy(self, server):
        return [self.url(server)] * 2

    def connected(self, last, timeout=PATIENCE):
        """A socket with an association at a proxy that then does last(peer), and that peer."""
        origin = self.origin(accept_datagrams(last))
        sock = self.enter(socks.socksocket(type=socket.SOCK_DGRAM, proxy=self.url(origin)))
        sock.settimeout(PATIENCE)
        sock.bind(('127.0.0.1', 0))
        sock.settimeout(timeout)
        return sock, origin.peers[-1]

    def test_ways(self):
        """Where the datagrams go, as the last proxy tells."""
        target, server = self.enter(Echo()), self.serve()
        for hops in (1, 2, 3):
            with self.subTest(hops), socks.socksocket(type=socket.SOCK_DGRAM) as sock:
                sock.set_proxy([self.url(server)] * hops)
                sock.settimeout(PATIENCE)
                for data in b'abc', b'', bytes(9000), os.urandom(65497):
                    # Beside TCP, the longest leaves no room for the prefix and the header.
                    self.check_datagram(sock, data, target, hops > 1 or len(data) < 60000)
                eventually(lambda: target.seen[-1] == data)
                sock.close()
                way = 'UDP_ASSOCIATE' if hops == 1 else 'UDP_IN_TCP'
                eventually(lambda: any(f'SOCKS5 {way} 1 target, 4 datagrams up' in line
                                       for line in self.lines))
                del self.lines[:]

    def test_on_request(self):
        """By a parameter of the URL; a proxy without it is asked for the usual way."""
        class Old(socks.Handler):
            do_UDP_IN_TCP = None

        target = self.enter(Echo())
        for handler, way in (socks.Handler, 'UDP_IN_TCP'), (Old, 'UDP_ASSOCIATE'):
            url = self.url(self.serve(handler)) + '?udp=tcp'
            with socks.socksocket(type=socket.SOCK_DGRAM, proxy=url) as sock:
                sock.settimeout(PATIENCE)
                sock.sendto(b'x', target.address)
                self.assertEqual(sock.recv(10), b'E:x')
            eventually(lambda: any(way + ' 1 target, ' in line for line in self.lines))

    def test_exempt_hosts(self):
        """They cannot be sent to beside the connection; connect() leaves it."""
        target, direct = self.enter(Echo()), self.enter(Echo('127.0.0.2'))
        with socks.default_proxy([self.url(self.serve())] * 2, bypass='127.0.0.2'):
            sock = self.enter(socks.socksocket(type=socket.SOCK_DGRAM))
        sock.settimeout(PATIENCE)
        sock.sendto(b'x', direct.address)
        self.assertEqual(sock.recvfrom(10), (b'E:x', direct.address))
        sock.sendto(b'x', target.address)
        self.assertEqual(sock.recvfrom(10), (b'E:x', target.address))
        for send in lambda: sock.sendto(b'y', direct.address), lambda: sock.sendmsg(
                [b'y'], [], 0, direct.address):
            with self.assertRaisesRegex(OSError, '127.0.0.2 is exempt') as caught:
                send()
            self.assertEqual(caught.exception.errno, errno.EHOSTUNREACH)
        sock.connect(direct.address)
        sock.send(b'z')
        self.assertEqual(sock.recvfrom(10), (b'E:z', direct.address))

    def test_messages(self):
        """Typed by hand.  A refusal of UDP_ASSOCIATE is asked about once more."""
        got = []

        def last(peer):
            got.append(peer.read(len(hexed(TO_IP + TO_NAME))))
            peer.send(hexed(TO_IP.replace('78', '41') + TO_NAME.replace('79', '42')))
            be_silent(peer)

        sock, _ = self.connected(last)
        self.assertEqual((sock.type & 15, sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)),
                         (socket.SOCK_DGRAM,) * 2)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)         # not the connection's
        self.assertEqual(sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS), 0)
        sock.sendto(b'x', ('1.2.3.4', 53))
        sock.sendto(b'y', ('localhost', 53))
        self.assertEqual(sock.recvfrom(10), (b'A', ('1.2.3.4', 53)))
        self.assertEqual(sock.recvfrom(10), (b'B', ('localhost', 53)))
        self.assertEqual(got, [hexed(TO_IP + TO_NAME)])

    def test_readable_when_a_datagram_is_there(self):
        """For select() and its like: also with several in one segment, and parts of one."""
        sock, peer = self.connected(be_silent, 0)
        first, second = hexed(TO_IP), hexed(TO_NAME)
        peer.send(first + second)
        for flags, data in ((socket.MSG_PEEK, b'x'), (0, b'x'), (socket.MSG_PEEK, b'y'), (0, b'y')):
            self.assertEqual(ready([sock], [], PATIENCE), [sock])
            self.assertEqual(sock.recv(10, flags), data)
        for piece in pieces(first, 1):
            with self.assertRaises(BlockingIOError):
                sock.recv(10)
            self.assertEqual(ready([sock], [], 0.001), [])
            peer.send(piece)
            self.assertEqual(ready([sock], [], PATIENCE), [sock])
        self.assertEqual([sock.recv(10, socket.MSG_PEEK), sock.recv(10)], [b'x'] * 2)
        sock.settimeout(PATIENCE)
        waiting = Background(sock.recv, 10)
        peer.send(second, 1)
        self.assertEqual(waiting.result(), b'y')

    def test_end_and_reset(self):
        """The end of the association, not that of the program's direction."""
        sock, _ = self.connected(lambda peer: (peer.finish(), peer.read(11), peer.reset()))
        self.assertTrue(ready([sock], [], PATIENCE))
        sock.sendto(b'x', ('1.2.3.4', 53))
        eventually(lambda: not sock._is_connected())
        for _ in range(2):
            with self.assertRaisesRegex(GENERAL, 'ended the UDP association'):
                sock.recvfrom(10)

    def test_peer_of_connect(self):
        """Datagrams of others are skipped, also when they are peeked at."""
        sock, peer = self.connected(be_silent)
        sock.connect(('1.2.3.4', 53))
        peer.send(hexed(TO_NAME.replace('0035', '0036') + TO_IP))
        self.assertEqual(sock.recv(10, socket.MSG_PEEK), b'x')
        self.assertEqual(sock.recvfrom(10), (b'x', ('1.2.3.4', 53)))

    def test_much_to_skip(self):
        """An event loop gets to other things in between."""
        sock, peer = self.connected(be_silent, 0)
        sock.connect(('1.2.3.4', 53))
        peer.send(hexed(TO_NAME * 100 + TO_IP))
        self.assertTrue(ready([sock], [], PATIENCE))
        with self.assertRaises(BlockingIOError):
            sock.recv(10)
        self.assertTrue(ready([sock], [], PATIENCE))
        self.assertEqual(sock.recv(10), b'x')

    def test_proxy_that_does_not_read(self):
        """What was sent in part is sent to its end, although the program only waits."""
        held = threading.Event()
        sock, peer = self.connected(lambda peer: held.wait(), 0)
        self.addCleanup(held.set)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        there, expected = ('1.2.3.4', 53), b''
        with self.assertRaises(BlockingIOError):
            while True:
                data = os.urandom(50000)
                sock.sendto(data, there)
                expected += struct.pack('!HB', len(data), 10) + hexed('01 01020304 0035') + data
        sock.settimeout(0.05)
        with self.assertRaises(socket.timeout):
            while True:                 # the connection may have taken some more
                sock.sendto(data, there)
                expected += struct.pack('!HB', len(data), 10) + hexed('01 01020304 0035') + data
        self.assertTrue(peer.read(len(expected)) == expected)
        sock.settimeout(PATIENCE)
        sock.sendto(b'x', there)
        self.assertEqual(peer.read(11), hexed(TO_IP))
        # What is closed meanwhile does not stay open because of the rest.
        sock.settimeout(0)
        with self.assertRaises(BlockingIOError):
            while True:
                sock.sendto(data, there)
        sock.close()
        peer.rest()

    def test_large_datagrams(self):
        sock, peer = self.connected(be_silent)
        self.assertEqual(sock.sendto(bytes(65507), ('1.2.3.4', 53)), 65507)
        for data, host in ((bytes(65508), '1.2.3.4'), (bytes(65536), '1.2.3.4'),
                           (b'', 'a.' * 124 + 'a')):
            with self.assertRaises(OSError) as caught:
                sock.sendto(data, (host, 53))
            self.assertEqual(caught.exception.errno, errno.EMSGSIZE)
        peer.send(hexed('ffff 0a 01 01020304 0035') + bytes(65535))
        self.assertEqual(len(sock.recv(1 << 17)), 65535)

    def test_the_end(self):
        for name, last, text in (('closed', leave, ''), ('reset', Peer.reset, ''),
                                 ('malformed', lambda peer: peer.send(b'\0\1\0\1\1'), 'HDRLEN 0'),
                                 ('in a message', lambda peer: peer.send(b'\0'), '')):
            with self.subTest(name):
                sock, _ = self.connected(lambda peer: (peer.read(11), last(peer)))
                sock.sendto(b'x', ('1.2.3.4', 53))
                for expected in text, '':
                    self.assertRaisesRegex(GENERAL, 'ended the UDP association.*' + expected,
                                           sock.recv, 10)
                self.assertEqual(ready([sock], [], 0.001), [])      # no loop is kept busy

        sock, _ = self.connected(lambda peer: (peer.read(11), peer.reset()))
        with self.assertRaisesRegex(GENERAL, 'ended the UDP association'):
            while True:
                sock.sendto(b'x', ('1.2.3.4', 53))
        with self.assertRaisesRegex(GENERAL, 'ended the UDP association'):
            sock.recv(10)

    def test_refusals(self):
        class Old(socks.Handler):
            do_UDP_IN_TCP = None

        class Older(Old):
            do_UDP_ASSOCIATE = None

        def close_on_the_second(peer):
            peer.read(3)
            peer.send(b'\5\0')
            if peer.read(10)[1] == 3:
                peer.send(hexed('050700 01 00000000 0000'))

        old, older, silent = self.serve(Old), self.serve(Older), self.origin(close_on_the_second)
        denying = self.serve(rules=(socks.parse_rule('deny udp to *', 'here'),
                                    socks.parse_rule('allow to 127.0.0.0/8', 'here')))
        for proxy, kind, reply, text in (
                ([self.url(old)] * 2, socks.SOCKS5Error, 7, 'needs a last proxy with UDP inside'),
                ([self.url(older)], socks.SOCKS5Error, 7, 'Command not supported'),
                ([f'socks5h://127.0.0.1:{silent.port}'], socks.SOCKS5Error, 7, 'not supported'),
                ([self.url(denying)], socks.SOCKS5Error, 2, 'not allowed'),
                ([self.url(old), self.url(denying)], socks.SOCKS5Error, 2, 'not allowed'),
                ([self.url(old), self.url(old, 'http')], socks.SOCKS5Error, 7, 'expected SOCKS5')):
            with self.subTest(proxy), socks.socksocket(type=socket.SOCK_DGRAM) as sock:
                sock.set_proxy(proxy)
                with self.assertRaisesRegex(kind, text) as caught:
                    sock.bind(('127.0.0.1', 0))
                self.assertEqual((caught.exception.reply, caught.exception.errno),
                                 (reply, errno.EACCES if reply == 2 else errno.EOPNOTSUPP))


class DatagramsOfSocks6Test(DatagramClientTest):
    """UDP through SOCKS6 proxies, always in the connection."""
    test_bound_to_one_of_several_addresses = test_bypass = test_announced_relays = None
    test_proxy_of_both_families = None

    def serve(self, *args, **settings):
        return super().serve(*args, **dict(settings, socks6=True))

    def proxy(self, server):
        return self.url(server, 'socks6h')

    def test_ways(self):
        """In chains, in TLS, and from one server to another."""
        target, server = self.enter(Echo()), self.serve(users={'bob': 's'})
        secure = self.serve(tls=server_context())
        six, five = self.url(server, 'socks6h', 'bob:s@'), self.url(server, user='bob:s@')
        last = self.serve(upstream=six)
        for chain in ([six], [six] * 3, [five, six], [six, five],
                      [self.url(secure, 'socks6h+tls')], [self.url(secure, 'socks6+tls'), five],
                      [self.url(last)], [self.url(last, 'socks6')]):
            with self.subTest(chain), socks.socksocket(type=socket.SOCK_DGRAM) as sock:
                sock.set_proxy(chain)
                sock.ssl_context = client_context()
                sock.settimeout(PATIENCE)
                for data in b'abc', b'', bytes(65497):
                    # With the prefix, the longest is too long.
                    self.check_datagram(sock, data, target, len(data) < 60000)

    def answering(self, *script, begun='0601 000c 31*8', confirmed='0602 000c 31*8'):
        """A socket for an association at a proxy with a script."""
        begin = ['0603 0000 0000 00 01 00000000', '0600 0000' + OK6 + begun,
                 '0603 0014 3131313131313131 01 00 0000 00000000', confirmed]
        proxy = self.scripted(begin + list(script), last=leave)
        sock = self.enter(socks.socksocket(type=socket.SOCK_DGRAM, proxy=self.proxy(proxy)))
        sock.settimeout(PATIENCE)
        return sock

    def test_messages(self):
        """Typed by hand; those of another association or kind are skipped, also by MSG_PEEK."""
        message = '0603 0015 3131313131313131 01 00 0035 01020304'
        wrong = ('0604 000c 3131313131313131' + message.replace('3131', '3232') + '78'
                 + message.replace('01 00 0035', '02 00 0035') + '78 0603 000c 3131313131313131')
        sock = self.answering(message + '78', wrong + message + '41')
        self.assertEqual(sock.sendto(b'x', ('1.2.3.4', 53)), 1)
        for flags in socket.MSG_PEEK, 0:
            self.assertEqual(sock.recvfrom(10, flags), (b'A', ('1.2.3.4', 53)))

    def test_malformed(self):
        for messages, text in (('0603 000b 3131313131313131', 'message of 11 bytes'),
                               ('05', 'ended the UDP')):
            sock = self.answering('', messages)
            sock.bind(('127.0.0.1', 0))
            with self.assertRaisesRegex(GENERAL, text):
                sock.recv(10)

    def test_begin(self):
        """The proxy has to name the association, and to confirm it."""
        for answers, text in (({'confirmed': ''}, 'closed unexpectedly'),
                              ({'begun': '0603 000c 31*8'}, 'types 1 and 2'),
                              ({'confirmed': '0602 000c 32*8'}, 'types 1 and 2'),
                              ({'confirmed': '0601 000c 31*8'}, 'types 1 and 2')):
            with self.subTest(answers), self.assertRaisesRegex(GENERAL, text):
                self.answering(**answers).bind(('127.0.0.1', 0))


class DefaultProxyTest(ClientCase):
    """The default proxy, and programs that do not know of it."""

    def default(self, *args, **kwargs):
        socks.set_default_proxy(*args, **kwargs)
        self.addCleanup(setattr, socks.socksocket, 'default_proxy', None)
        self.addCleanup(setattr, socks.socksocket, 'default_bypass', '')
        self.addCleanup(socks.ImportGuard.remove)

    def test_modules_to_wrap(self):
        """The module `socket` itself, or one that has imported it; another is an error."""
        self.default('socks5h://127.0.0.1:9')
        stock = socket.socket, socket.getaddrinfo
        self.addCleanup(socks.unwrap_module, http.client)
        for module in socket, http.client:
            socks.wrap_module(module, dns=True)
            self.assertEqual((socket.socket, socket.getaddrinfo),
                             (socks.socksocket, socks.getaddrinfo))
            for other in json, socket.socket, argparse.Namespace(socket=socket.socket), None:
                with self.assertRaisesRegex(ValueError, 'expected socket, or a module'):
                    socks.unwrap_module(other)
            self.assertEqual(socket.socket, socks.socksocket)
            socks.unwrap_module(module)
            self.assertEqual((socket.socket, socket.getaddrinfo), stock)
            self.assertFalse(hasattr(socket.socket, 'socket'))
            with self.assertRaisesRegex(ValueError, 'expected socket, or a module'):
                socks.wrap_module(json)
            self.assertEqual((socket.socket, socket.getaddrinfo), stock)

    def test_default_proxy(self):
        server, origin = self.serve(), self.origin(echo)
        target = '127.0.0.1', origin.port
        self.assertIsNone(socks.get_default_proxy())
        with self.assertRaises(GENERAL):
            socks.wrap_module(http.client)
        self.default(socks.SOCKS5, *server.server_address, username='u', password=b'p')
        self.assertEqual(socks.getdefaultproxy(), (2, *server.server_address, True, b'u', b'p'))
        with socks.create_connection(target) as sock:
            self.assertEqual(sock.get_proxy_peername(), tuple(server.server_address))
        arguments = dict(zip(('proxy_type', 'proxy_addr', 'proxy_port', 'proxy_rdns',
                              'proxy_username', 'proxy_password'), socks.get_default_proxy()))
        with socks.create_connection(target, **arguments) as sock:      # as paho-mqtt does
            self.assertEqual(sock.get_proxy_peername(), tuple(server.server_address))
        with socks.create_connection(target, proxy=[]) as sock:
            self.assertIsNone(sock.get_proxy_peername())
        socks.socksocket.default_proxy = None
        with socks.create_connection(target) as sock:
            self.assertIsNone(sock.get_proxy_peername())
        chain = [self.url(server), self.url(server, 'socks4a')]
        self.default(chain, bypass='127.0.0.0/8, .local')
        self.assertEqual(socks.get_default_proxy()[1:3], server.server_address)
        with socks.create_connection(target) as sock:
            self.assertIsNone(sock.get_proxy_peername())
        with socks.socksocket() as sock:
            sock.connect(target)
            self.assertIsNone(sock.get_proxy_peername())
        with socks.create_connection(('localhost', origin.port), **dict(
                arguments, proxy_type=socks.get_default_proxy()[0])) as sock:
            self.check_echo(sock)
        eventually(lambda: sum('SOCKS4 CONNECT localhost' in line for line in self.lines))
        socks.setdefaultproxy()
        self.assertEqual(socks.get_default_proxy(), (None, None, None, True, None, None))
        with socks.create_connection(target) as sock:
            self.assertIsNone(sock.get_proxy_peername())

    def test_default_proxy_of_a_thread(self):
        server, origin = self.serve(), self.origin(echo)
        seen = []

        def elsewhere():
            with socks.socksocket() as sock:
                seen.append(sock.proxy)

        with socks.default_proxy(self.url(server), bypass='10.0.0.0/8'):
            Background(elsewhere).result()
            with socks.socksocket() as sock, socks.default_proxy(None):
                sock.connect(('localhost', origin.port))
                self.assertEqual(sock.get_proxy_peername(), tuple(server.server_address))
                with socks.socksocket() as direct:
                    self.assertIsNone(direct.proxy[0])
        self.assertEqual(seen, [(None,) * 6])
        self.assertIsNone(socks.get_default_proxy())

    def test_wrapped_module(self):
        """A program that knows nothing of proxies; with dns, no name is looked up here."""
        server, site = self.serve(), self.origin(serve_page)
        url = f'http://localhost:{site.port}/'
        self.addCleanup(socks.unwrap_module, http.client)
        with socks.default_proxy(self.url(server)):
            for dns in (False, True):
                socks.wrap_module(http.client, dns)
                with urllib.request.urlopen(url) as page:
                    self.assertEqual(page.read(), b'hello\n')
            self.assertEqual(socket.getaddrinfo('::1', 80)[0][4], ('::1', 80, 0, 0))
            self.assertTrue(socket.getaddrinfo(None, 80))
        self.assertEqual(socket.socket.__module__, 'socks')
        socks.unwrapmodule(http.client)
        self.assertIs(socket.socket, socks._orgsocket)
        self.assertNotEqual(socket.getaddrinfo, socks.getaddrinfo)
        eventually(lambda: len(self.lines) == 2)
        self.assertIn(f'CONNECT localhost:{site.port}: done', self.lines[1])

    def test_a_server_beside_a_wrapped_module(self):
        """The server's own sockets are stock ones, whatever socket.socket is."""
        origin = self.origin(echo)
        server = self.serve()
        self.addCleanup(socks.unwrap_module, http.client)
        with socks.default_proxy(self.url(server)):
            socks.wrap_module(http.client, dns=True)
            with socket.create_connection(('localhost', origin.port)) as sock:
                self.check_echo(sock)
            socks.unwrap_module(http.client)
        eventually(lambda: len(self.lines) == 1)


class VirtualAddressesTest(unittest.TestCase):

    def test_both_families(self):
        addresses = socks.VirtualAddresses()
        ipv4, ipv6 = addresses.of('host.example'), addresses.of('host.example', socket.AF_INET6)
        self.assertIn(ipaddress.ip_address(ipv4), ipaddress.ip_network('198.18.0.0/15'))
        self.assertEqual(ipaddress.ip_address(ipv6), ipaddress.ip_address(f'100::{ipv4}'))
        self.assertEqual(addresses.of('host.example'), ipv4)
        self.assertNotEqual(addresses.of('other.example'), ipv4)
        for host in (ipv4, ipv6, f'::ffff:{ipv4}', f'{ipv6}%1'):
            self.assertEqual(addresses.name(host), 'host.example')
        for host in ('198.17.255.255', '198.20.0.0', '127.0.0.1', '100:0:0:1::', '0.0.0.0',
                     'host.example', ''):
            self.assertIsNone(addresses.name(host))

    def test_an_address_of_nobody(self):
        """It is a real one: other software uses these networks, too."""
        addresses = socks.VirtualAddresses()
        for _ in range(2):
            for host in ('198.18.0.0', '100::198.18.0.0', '100::', '100::1', '100::dead:beef',
                         '100::1:0:0:1', '100::ffff:ffff:ffff:ffff%1'):
                self.assertIsNone(addresses.name(host))
            addresses.of('host.example')
            addresses.is_on = True

    def test_old_addresses(self):
        """They are errors, for as long as there are others; those in use are kept."""
        class Small(socks.VirtualAddresses):
            SIZE, COUNT = 4, 1024

        addresses = Small()
        first, kept = addresses.of('first.example'), addresses.of('kept.example')
        seen = set()
        for number in range(1000):
            seen.add(addresses.of(f'{number}.example'))
            self.assertEqual(addresses.name(kept), 'kept.example')
        self.assertEqual(len(seen), 1000)
        self.assertFalse({first, kept} & seen)
        for host in (first, f'100::{first}', f'::ffff:{first}'):
            with self.assertRaisesRegex(GENERAL, host + ' stands for no name') as caught:
                addresses.name(host)
            self.assertEqual(caught.exception.errno, errno.EHOSTUNREACH)
        for number in range(5000):
            self.assertNotEqual(addresses.of(f'{number}.test'), kept)
            self.assertEqual(addresses.name(kept), 'kept.example')
        for number in range(4):
            addresses.remember(f'10.0.0.{number}', 'a.example')
        self.assertEqual(addresses.origin('10.0.0.0'), 'a.example')
        addresses.remember('10.0.0.4', 'a.example')
        self.assertIsNone(addresses.origin('10.0.0.0'))

    def test_threads(self):
        class Small(socks.VirtualAddresses):
            SIZE = 500

        addresses = Small()

        def use():
            for number in range(2000):
                name = f'{number % 100}.example'
                self.assertEqual(addresses.name(addresses.of(name)), name)
                addresses.of(f'{threading.get_ident()}-{number}.example')

        for thread in [Background(use) for _ in range(4)]:
            thread.result()

    @unittest.skipUnless(hasattr(os, 'register_at_fork'), 'needs Python 3.7')
    def test_fork(self):
        """A child gives other addresses, so that none means two names, and its lock is free."""
        script = """
import os, socks
names = socks.virtual_addresses
first = names.of('own.example')
with names._lock:
    child = os.fork()
assert names.name(first) == 'own.example'
os.write(1, names.of('new.example').encode() + b'\\n')
if child:
    os.waitpid(child, 0)
"""
        done = run(sys.executable, '-c', script, cwd=compiled())
        self.assertEqual(done.stderr, '')
        self.assertEqual(len(set(done.stdout.split())), 2, done.stdout)


def local_host():
    """The first IP address of localhost."""
    return resolve(Address('localhost', 0))[0].host


def serve_passive_ftp(peer):
    """FTP, passive, as far as urllib wants it; the address it tells is one that nothing has."""
    with socks.bound(Address(local_host(), 0)) as listener:
        listener.listen(1)
        listener.settimeout(PATIENCE)
        port = listener.getsockname()[1]
        peer.send(b'220 ready\r\n')
        for line in peer.sock.makefile():
            if line.startswith('RETR'):
                peer.send(b'150 here\r\n')
                sock, _ = listener.accept()
                sock.sendall(b'hello')
                sock.close()
            peer.send({'PASV': b'227 (192,0,2,1,%d,%d)\r\n' % divmod(port, 256),
                       'PASS': b'230 in\r\n', 'RETR': b'226 done\r\n'}.get(
                           line[:4], b'200 ok\r\n'))


class ResolverTest(ClientCase):
    """The functions of `socket` that look names up, and the addresses that they give instead."""

    def wrap(self, proxy, bypass=''):
        """Have socket.socket and the resolver wrapped, up to the end of the test."""
        self.enter(socks.default_proxy(proxy, bypass))
        self.addCleanup(socks.unwrap_module, http.client)
        socks.wrap_module(http.client, dns=True)

    def system(self, **found):
        """Let the system's resolver find what is given, by name, and fail the test for others."""
        stock = socks.getaddrinfo.stock

        def getaddrinfo(host, *args):
            text = host.decode() if isinstance(host, bytes) else host
            name = text and text.partition('.')[0]
            if name in found:
                return stock(found[name], *args)
            self.assertTrue(text is None or socks.ip_bytes(text), text)
            return stock(host, *args)

        self.change(socks.getaddrinfo, stock=getaddrinfo)

    def test_getaddrinfo(self):
        self.wrap('socks5h://127.0.0.1:9')
        tcp, udp = (socket.SOCK_STREAM, 6), (socket.SOCK_DGRAM, 17)
        (family, *kind, canonical, (host, port)), = socket.getaddrinfo(
            'host.example', 'http', 0, socket.SOCK_STREAM)
        self.assertEqual((family, *kind, canonical, port), (socket.AF_INET, *tcp, '', 80))
        self.assertEqual(socks.virtual_addresses.name(host), 'host.example')
        found = socket.getaddrinfo('host.example', 53, type=socket.SOCK_DGRAM,
                                   flags=socket.AI_CANONNAME)
        self.assertEqual(found, [(family, *udp, 'host.example', (host, 53))])
        self.assertEqual(socket.getaddrinfo(b'host.example', None, proto=6),
                         [(family, *tcp, '', (host, 0))])
        for info in socket.getaddrinfo('host.example', 80, socket.AF_INET6):
            self.assertEqual((info[0], socks.virtual_addresses.name(info[4][0])),
                             (socket.AF_INET6, 'host.example'))
        self.assertEqual(socket.getaddrinfo(host, 80, proto=6), [(family, *tcp, '', (host, 80))])
        self.assertEqual(socket.getaddrinfo('::1', 80)[0][4], ('::1', 80, 0, 0))
        self.assertEqual(socket.getaddrinfo('127.1', 80)[0][4], ('127.0.0.1', 80))
        for name in ('fa\u00df.example', '\u2603.net', '*.example.org'):
            self.assertEqual(socks.virtual_addresses.name(socket.gethostbyname(name)), name)
        self.assertEqual(socket.getaddrinfo('127.0.0.1.', 80)[0][4], ('127.0.0.1', 80))
        self.assertEqual(socket.getaddrinfo(None, 80, socket.AF_INET, tcp[0], 0,
                                            socket.AI_PASSIVE)[0][4], ('0.0.0.0', 80))
        for wrong in (('host.example', 'no-such-service'), ('a..example', 80), ('a b', 80),
                      ('x' * 300, 80), ('host.example', 80, 0, 0, 0, socket.AI_NUMERICHOST),
                      ('host.example', 80, 77)):
            with self.assertRaises(socket.gaierror, msg=wrong):
                socket.getaddrinfo(*wrong)

    def test_other_functions(self):
        self.wrap('socks5h://127.0.0.1:9')
        ip = socket.gethostbyname('host.example')
        self.assertEqual(socks.virtual_addresses.name(ip), 'host.example')
        for host in ('host.example', ip):
            self.assertEqual(socket.gethostbyaddr(host), ('host.example', [], [ip]))
        self.assertEqual(socket.gethostbyname_ex('host.example'), ('host.example', [], [ip]))
        name = bytearray(b'host.example')
        self.assertEqual(socket.gethostbyname(name), ip)
        for function in socket.gethostbyname_ex, socket.gethostbyaddr:
            self.assertEqual(function(name), ('host.example', [], [ip]))
        with socket.socket() as sock, self.assertRaisesRegex(OSError, 'not looked up'):
            sock.bind((name, 0))
        self.assertEqual(socket.getfqdn('short'), 'short')
        self.assertEqual(socket.getfqdn(ip), 'host.example')
        self.assertEqual(socket.getfqdn(), socket.gethostname())
        self.assertEqual(socket.gethostbyname('127.0.0.1'), '127.0.0.1')
        self.assertEqual(socket.gethostbyname_ex('127.0.0.1')[2], ['127.0.0.1'])
        self.assertEqual(socket.gethostbyname('<broadcast>'), '255.255.255.255')
        self.assertEqual(socket.getnameinfo((ip, 80), 0), ('host.example', 'http'))
        self.assertEqual(socket.getnameinfo((ip, 80), socket.NI_NUMERICSERV
                                            | socket.NI_NUMERICHOST), (ip, '80'))
        self.assertEqual(socket.getnameinfo(('127.0.0.1', 80), 0), ('127.0.0.1', 'http'))
        with self.assertRaises(socket.gaierror):
            socket.getnameinfo(('192.0.2.1', 80), socket.NI_NAMEREQD)
        for host in ('192.0.2.1', '198.18.0.0'):
            with self.assertRaises(socket.herror):
                socket.gethostbyaddr(host)

    def test_connect(self):
        """The proxy gets the name, the program sees an IP address."""
        def ask(last=echo):
            proxy = self.scripted(['050100', '0500', f'05010003{NAME}01bb', OK5], last=last)
            self.wrap(self.url(proxy))
            return proxy

        ask()
        with socket.create_connection(('example.org', 443)) as sock:
            self.check_echo(sock)
            ip, port = sock.getpeername()
            self.assertEqual(socket.getnameinfo((ip, port), socket.NI_NUMERICSERV),
                             ('example.org', '443'))
            with sock.dup() as other:
                self.assertEqual(other.getpeername(), (ip, 443))
        for name in 'example.org', b'example.org', bytearray(b'example.org'):
            with socket.socket() as sock:
                sock.connect((name, 443))
                self.assertEqual(sock.getpeername(), (ip, 443))
        if socket.has_ipv6:
            with socket.socket(socket.AF_INET6) as sock:
                sock.connect(('example.org', 443))
                ipv6 = socks.virtual_addresses.of('example.org', socket.AF_INET6)
                self.assertEqual(sock.getpeername(), (ipv6, 443, 0, 0))
            with socket.socket(socket.AF_INET6) as sock:
                self.assertEqual(sock.connect_ex((f'::ffff:{ip}', 443, 0, 0)), 0)
                self.assertEqual(sock.getpeername()[0], f'::ffff:{ip}')
        with socks.create_connection((ip, 443)) as sock:
            self.check_echo(sock)

    def test_real_addresses_among_the_virtual_ones(self):
        """Some resolvers answer with such addresses, which only the system or the proxy knows."""
        proxy = self.scripted(['050100', '0500', '05010001c612000001bb', OK5])      # 198.18.0.0
        self.wrap(self.url(proxy), 'intranet.example')
        socket.gethostbyname('host.example')
        with socket.create_connection(('198.18.0.0', 443)) as sock:
            self.check_echo(sock)
        # That of a host without the proxy must not be taken for a name that the proxy looks up.
        self.system(intranet='198.18.0.1')
        self.change(socks.gethostbyname, stock=lambda host: '198.18.0.1')
        self.change(socks.gethostbyname_ex, stock=lambda host: (host, [], ['198.18.0.1']))
        found = [socket.getaddrinfo('intranet.example', 80)[0][4][0],
                 socket.gethostbyname('intranet.example'),
                 *socket.gethostbyname_ex('intranet.example')[2]]
        self.assertEqual([socks.virtual_addresses.name(ip) for ip in found],
                         ['intranet.example'] * 3)
        self.assertEqual(socks.virtual_addresses.origin('198.18.0.1'), 'intranet.example')
        origin = self.origin(echo)
        self.system(intranet='127.0.0.1')       # connect() looks the real one up
        with socket.create_connection((found[0], origin.port)) as sock:
            self.check_echo(sock)

    def test_real_addresses_looked_up_here(self):
        proxy = self.scripted(['050100', '0500', '05010001c612000101bb', OK5])      # 198.18.0.1
        self.wrap(self.url(proxy, 'socks5'))
        self.system(host='198.18.0.1')
        with socket.create_connection(('host.example', 443)) as sock:
            self.check_echo(sock)

    def test_urllib_and_ftp(self):
        """It looks the host up by itself, and connects to getpeername() for the data."""
        server, origin = self.serve(), self.origin(serve_passive_ftp, local_host())
        self.wrap(self.url(server))
        with urllib.request.urlopen(f'ftp://localhost:{origin.port}/file') as page:
            self.assertEqual(page.read(), b'hello')
        eventually(lambda: len(self.lines) == 2)
        self.assertEqual(sum('CONNECT localhost:' in line for line in self.lines), 2)

    def test_every_thread(self):
        """A thread without a context, as asyncio's that look names up, has the proxy, too."""
        server, origin = self.serve(), self.origin(echo, local_host())
        self.wrap(self.url(server))

        def fetch():
            with socket.create_connection(('localhost', origin.port)) as sock:
                self.check_echo(sock)
                return sock.get_proxy_peername()

        async def talk():
            reader, writer = await asyncio.open_connection('localhost', origin.port)
            peer = writer.get_extra_info('peername')
            writer.write(b'hello')
            self.assertEqual(await reader.readexactly(5), b'hello')
            writer.close()
            return peer

        (*_, (ip, port)), *_ = Background(socket.getaddrinfo, 'host.invalid', 80).result()
        self.assertEqual(socks.virtual_addresses.name(ip), 'host.invalid')
        self.assertEqual(Background(fetch).result(), tuple(server.server_address))
        ip, port = AsyncTest.run_async(self, talk())
        self.assertEqual(socks.virtual_addresses.name(ip), 'localhost')

    def test_bypassed(self):
        """They are looked up as usual, and what is found is reached directly."""
        ipv4, dead = self.origin(echo), self.refused_port()
        self.system(intranet='127.0.0.1', outer='127.0.0.1')
        self.wrap(f'socks5h://127.0.0.1:{dead}', '.local')
        with socket.create_connection(('intranet.local', ipv4.port)) as sock:
            self.assertEqual(sock.getpeername(), ('127.0.0.1', ipv4.port))
        self.assertEqual(socket.getnameinfo(('127.0.0.1', 1), 0)[0], 'intranet.local')
        with self.assertRaises(socks.ProxyConnectionError):
            socket.create_connection(('outer.example', ipv4.port))

    @unittest.skipUnless(socket.has_ipv6, 'there is no IPv6 here')
    def test_bypassed_with_ipv6_only(self):
        try:
            origin = self.origin(echo, '::1')
        except OSError as error:
            self.skipTest(str(error))
        self.system(intranet='::1')
        self.wrap(f'socks5h://127.0.0.1:{self.refused_port()}', '.local')
        with socket.create_connection(('intranet.local', origin.port)) as sock:
            self.check_echo(sock)
        ip = socket.gethostbyname('intranet.example')           # given by a thread with a proxy
        socket.getaddrinfo, stock = socks.getaddrinfo.stock, socket.getaddrinfo
        self.addCleanup(setattr, socket, 'getaddrinfo', stock)
        with socks.default_proxy(None), socket.socket() as sock:
            sock.connect((ip, origin.port))
            self.check_echo(sock)

    def test_datagrams(self):
        """An answer comes from where the program sent to, as far as it can know that."""
        local = local_host()
        server, target, other = self.serve(), self.enter(Echo(local)), self.enter(Echo())
        self.wrap(self.url(server))
        name = socket.gethostbyname('localhost'), target.address.port
        self.assertEqual(socks.virtual_addresses.name(name[0]), 'localhost')
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            self.assertEqual(sock.sendto(b'x', name), 1)
            self.assertEqual(sock.recvfrom(10), (b'E:x', name))
            self.assertEqual(sock.sendmsg([b'y'], [], 0, name), 1)
            self.assertEqual(sock.recvfrom(10), (b'E:y', name))
            sock.sendto(b'z', tuple(other.address))
            self.assertEqual(sock.recvfrom(10), (b'E:z', tuple(other.address)))
            sock.sendto(b'x', (local, name[1]))         # so it could be either
            self.assertEqual(sock.recvfrom(10)[1][1], name[1])
            sock.sendto(b'x', name)
            self.assertEqual(sock.recvfrom(10)[1], (local, name[1]))
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(name)
            self.assertEqual(sock.getpeername(), name)
            sock.send(b'x')
            self.assertEqual(sock.recvfrom(10), (b'E:x', name))

    def test_endpoints(self):
        """Virtual addresses as destinations; who answers is who was sent to."""
        server, target = self.serve(), self.enter(Echo(local_host()))
        self.wrap(self.url(server))
        virtual = socket.gethostbyname('localhost'), target.address.port

        async def talk(proxy, **options):
            transport, protocol = await socks.create_datagram_endpoint(
                EventQueue, proxy=proxy, **options)
            await protocol.next()
            transport.sendto(b'x', None if options else virtual)
            self.assertEqual(await protocol.next(), ('received', (b'E:x', virtual)))
            transport.close()
            await protocol.next()

        for proxy in (None, [self.url(server)] * 2, self.url(server, 'socks5')):
            for options in {}, {'remote_addr': virtual}:
                with self.subTest(proxy, **options):
                    self.run_async(talk(proxy, **options))

    def test_own_listeners(self):
        """What a process connects to itself on loopback does not go through the proxy."""
        self.wrap(f'socks5h://127.0.0.1:{self.refused_port()}')
        for near in socks.stock_pair():
            self.assertIs(type(near), socks._orgsocket)
            near.close()
        with socket.socket() as listener:
            listener.bind(('127.0.0.1', 0))
            address = listener.getsockname()
            with socket.socket() as sock, self.assertRaises(socks.ProxyConnectionError):
                sock.connect(address)           # it does not listen yet
            listener.listen(1)
            hosts = [address[0]]
            if local_host() == address[0]:
                hosts += ['localhost', socket.gethostbyname('localhost')]
            for host in hosts:
                with socket.create_connection((host, address[1])) as near:
                    far, source = listener.accept()
                    far.close()
                    self.assertEqual(near.getsockname(), source)
                    self.assertIsNone(near.get_proxy_peername())
            with socks.create_connection(address) as near:
                listener.accept()[0].close()
            with socket.socket() as sock, self.assertRaises(socks.ProxyConnectionError):
                sock.connect(('192.0.2.1', address[1]))
        with socket.socket() as sock, self.assertRaises(socks.ProxyConnectionError):
            sock.connect(address)

    def test_bind(self):
        """A program's own names are looked up, for nothing else can be bound to."""
        self.wrap('socks5h://127.0.0.1:9')
        local = local_host()
        with socket.socket(socks.family_of(local)) as sock:
            (*_, sockaddr), *_ = socket.getaddrinfo('localhost', 0, sock.family)
            self.assertTrue(socks.virtual_addresses.name(sockaddr[0]))
            sock.bind(sockaddr)
            self.assertEqual(sock.getsockname()[0], local)
        for host in ('host.example', socket.gethostbyname('host.example')):
            with socket.socket() as sock, self.assertRaisesRegex(OSError, 'not looked up'):
                sock.bind((host, 0))


class PastTheProxyTest(ClientCase):
    """What cannot go through the proxy is an error that says so."""

    KINDS = [
        ('raw', socket.SOCK_RAW, 1), ('ICMP', socket.SOCK_DGRAM, 1),
        ('UDP-Lite', socket.SOCK_DGRAM, 136), ('SCTP', socket.SOCK_STREAM, 132),
        ('SCTP', getattr(socket, 'SOCK_SEQPACKET', 5), 132), ('DCCP', 6, 33)]

    def test_other_protocols(self):
        tried = 0
        for name, kind, proto in self.KINDS:
            try:
                sock = self.enter(socks.socksocket(
                    socket.AF_INET, kind, proto, proxy='socks5h://127.0.0.1:9'))
            except OSError:                     # not here, or only for root
                continue
            tried += 1
            with self.subTest(name):
                target = '127.0.0.1', 9
                for send in (sock.connect, functools.partial(sock.sendto, b'x'),
                             functools.partial(sock.sendto, b'x', 0),
                             functools.partial(sock.sendmsg, [b'x'], [], 0)):
                    self.assertRaisesRegex(OSError, f'{errno.EOPNOTSUPP}] only TCP and UDP',
                                           send, target)
                self.assertEqual(sock.connect_ex(target), errno.EOPNOTSUPP)
                sock.set_proxy()
                with contextlib.suppress(OSError):
                    sock.connect(target)        # a stock socket
        if not tried:
            self.skipTest('this user can make no such sockets')

    @unittest.skipUnless(hasattr(socket, 'AF_PACKET'), 'no packet sockets here')
    def test_packets(self):
        try:
            sock = self.enter(socks.socksocket(socket.AF_PACKET, socket.SOCK_RAW,
                                               proxy='socks5h://127.0.0.1:9'))
        except PermissionError:
            self.skipTest('this user cannot make packet sockets')
        for function in sock.bind, functools.partial(sock.sendto, b'x'):
            with self.assertRaisesRegex(OSError, 'only TCP and UDP'):
                function(('lo', 0))

    def test_mptcp(self):
        server, origin = self.serve(), self.origin(echo)
        try:
            sock = self.enter(socks.socksocket(proto=262, proxy=self.url(server)))
        except OSError as error:
            self.skipTest(str(error))
        sock.connect(('127.0.0.1', origin.port))
        self.check_echo(sock)
        self.assertEqual(sock.get_proxy_peername(), tuple(server.server_address))

    def test_data_before_a_connection(self):
        """MSG_FASTOPEN, with which Linux connects in sendto() and sendmsg()."""
        server, origin = self.serve(), self.origin(echo)
        target = '127.0.0.1', origin.port
        for method, arguments in (('sendto', (b'data', socks.MSG_FASTOPEN)),
                                  ('sendmsg', ([b'da', b'ta'], [], socks.MSG_FASTOPEN))):
            with socks.socksocket(proxy=self.url(server)) as sock:
                self.assertEqual(getattr(sock, method)(*arguments, target), 4)
                self.assertEqual(sock.recv(10), b'data')
                self.assertEqual(sock.get_proxy_peername(), tuple(server.server_address))

    def test_descriptor_that_is_not_connected(self):
        """Who takes it would connect past the proxy."""
        server, origin = self.serve(), self.origin(echo)
        target = '127.0.0.1', origin.port
        with socks.socksocket(proxy=self.url(server)) as sock:
            for take in sock.detach, functools.partial(client_context().wrap_socket, sock,
                                                       server_hostname='localhost'):
                with self.assertRaisesRegex(GENERAL, 'Connect first'):
                    take()
            sock.connect(target)                # it is still good
            self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
                             socket.SOCK_STREAM)
            with socket.socket(fileno=sock.detach()) as stock:
                self.check_echo(stock)
        with socks.socksocket(proxy=self.url(server)) as sock, sock.dup() as other:
            other.connect(target)
            self.assertEqual(other.get_proxy_peername(), tuple(server.server_address))
        with socks.socksocket(proxy=self.url(server)) as sock:
            sock.bind(('127.0.0.1', 0))
            sock.listen(1)
            socket.socket(fileno=sock.detach()).close()
        with socks.socksocket() as sock:
            socket.socket(fileno=sock.detach()).close()
        with socks.default_proxy(self.url(server), bypass='127.0.0.1'):
            sock = self.enter(socks.socksocket())
        sock.setblocking(False)
        sock.connect_ex(('127.0.0.1', self.silent_port()))      # it is on its way
        socket.socket(fileno=sock.detach()).close()

    def test_accepted_and_reset(self):
        """A default proxy does not concern what came in, even if it is not connected any more."""
        with socks.default_proxy('socks5h://127.0.0.1:9'):
            listener = self.enter(socks.socksocket())
            listener.bind(('127.0.0.1', 0))
            listener.listen(1)
            with socket.socket() as client:
                client.connect(listener.getsockname())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, socks.RESET)
            self.change(socket, socket=socks.socksocket)
            sock, _ = listener.accept()
        self.change(socket, socket=socks._orig_socket)
        with sock:
            self.assertTrue(ready([sock], [], PATIENCE))
            self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
                             socket.SOCK_STREAM)
            for send in (functools.partial(sock.sendto, b'x'),
                         functools.partial(sock.sendmsg, [b'x'], [], 0)):
                with self.assertRaises(OSError) as caught:
                    send(('127.0.0.1', 9))
                self.assertNotIsInstance(caught.exception, socks.ProxyError)
            socket.socket(fileno=sock.detach()).close()

    def test_tls_and_the_destination(self):
        """A socket of ssl that is one of ours tells what it is connected to, as FTP_TLS asks."""
        proxy = self.scripted(['050100', '0500', f'05010003{NAME}01bb', OK5], last=serve_tls)
        script = f"""
import socks, socket
socks.set_default_proxy({self.url(proxy)!r})
socks.wrap_module(socks, dns=True)
import ssl
context = ssl.create_default_context(cadata={CERTIFICATE!r})
plain = socket.create_connection(('example.org', 443))
with context.wrap_socket(plain, server_hostname='localhost') as sock:
    sock.sendall(b'hello')
    assert sock.recv(5) == b'HELLO'
    assert socket.getfqdn(sock.getpeername()[0]) == 'example.org', sock.getpeername()
"""
        done = run(sys.executable, '-W', 'ignore', '-c', script, cwd=compiled())
        self.assertEqual((done.returncode, done.stderr), (0, ''))

    def test_proactor(self):
        """What asyncio uses on Windows connects a descriptor, not the socket."""
        class Proactor:
            _loop = asyncio.new_event_loop()

            def connect(self, conn, address):
                return 'stock', address

            def sendto(self, conn, buf, flags=0, addr=None):
                return 'stock', addr

        self.addCleanup(Proactor._loop.close)
        server, origin = self.serve(), self.origin(echo)
        target = '127.0.0.1', origin.port
        socks.wrap_proactor(Proactor)
        socks.wrap_proactor(Proactor)
        proactor = Proactor()
        with socks.socksocket(proxy=self.url(server)) as sock:
            self.assertIsNone(proactor.connect(sock, target).result())
            self.check_echo(sock)
        for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM:
            with socks.socksocket(type=kind) as sock, socket.socket(type=kind) as stock:
                self.assertEqual(proactor.connect(sock, target), ('stock', target))
                self.assertEqual(proactor.sendto(stock, b'x', 0, target), ('stock', target))
        with socks.socksocket(type=socket.SOCK_DGRAM, proxy=self.url(server)) as sock:
            for send in proactor.connect, functools.partial(proactor.sendto, buf=b'x', addr=target):
                with self.assertRaisesRegex(OSError, 'SelectorEventLoop'):
                    send(sock, *([target] if send == proactor.connect else []))

    def test_imports(self):
        """Modules that connect in a way of their own."""
        self.enter(socks.default_proxy('socks5h://127.0.0.1:9'))
        self.addCleanup(socks.unwrap_module, http.client)
        socks.wrap_module(http.client, dns=True)
        for name in ('gevent.monkey', 'eventlet', 'uvloop', 'pycares'):
            if name.partition('.')[0] not in sys.modules:
                with self.assertRaisesRegex(ImportError, 'bypass the proxy'):
                    importlib.import_module(name)
        with self.assertRaisesRegex(ImportError, 'bypass the proxy'):
            importlib.reload(socket)
        socks.unwrap_module(http.client)
        socks.wrap_module(http.client)
        for module in {'winloop', 'pycares'} - sys.modules.keys():
            self.fake_module(module)
            with self.assertLogs(socks.log, 'WARNING') as caught:
                importlib.import_module(module)
            self.assertIn(f'connections of the module {module} bypass the proxy', caught.output[0])
        socks.unwrap_module(http.client)
        self.assertNotIn(socks.ImportGuard, sys.meta_path)

    def fake_module(self, name):
        self.write(name + '.py', '')
        sys.path.insert(0, self.folder)
        self.addCleanup(sys.path.remove, self.folder)
        self.addCleanup(sys.modules.pop, name, None)
        importlib.invalidate_caches()

    @unittest.skipIf('winloop' in sys.modules, 'on Windows, with winloop')
    def test_imported_before(self):
        self.fake_module('winloop')
        importlib.import_module('winloop')
        self.enter(socks.default_proxy('socks5h://127.0.0.1:9'))
        self.addCleanup(socks.unwrap_module, socket)
        before = socket.socket, socket.getaddrinfo
        with self.assertRaisesRegex(GENERAL, 'winloop bypass the proxy.* imported already'):
            socks.wrap_module(socket, dns=True)
        self.assertEqual((socket.socket, socket.getaddrinfo), before)
        self.assertFalse(socks.virtual_addresses.is_on)
        self.assertNotIn(socks.ImportGuard, sys.meta_path)
        with self.assertLogs(socks.log, 'WARNING') as caught:
            socks.wrap_module(socket)
        self.assertIn('connections of the module winloop bypass the proxy', caught.output[0])
        with self.assertRaisesRegex(GENERAL, 'winloop bypass the proxy.* imported already'):
            socks.wrap_module(socket, dns=True)
        sys.modules['winloop'] = None           # this forbids to import it
        socks.wrap_module(socket, dns=True)

    @unittest.skipIf('winloop' in sys.modules, 'on Windows, with winloop')
    def test_imports_with_a_default_proxy(self):
        """A program may replace socket.socket itself, as PySocks' do."""
        self.fake_module('winloop')
        self.addCleanup(setattr, socks.socksocket, 'default_proxy', None)
        self.addCleanup(socks.ImportGuard.remove)
        socks.set_default_proxy()
        self.assertNotIn(socks.ImportGuard, sys.meta_path)
        socks.set_default_proxy('socks5h://127.0.0.1:9')
        with self.assertLogs(socks.log, 'WARNING') as caught:
            importlib.import_module('winloop')
        self.assertIn('connections of the module winloop bypass the proxy', caught.output[0])
        socks.set_default_proxy()
        self.assertNotIn(socks.ImportGuard, sys.meta_path)

    def test_interpreters(self):
        """Another interpreter in the process imports a stock `socket`; what does not use one can
        be imported."""
        script = """
import importlib, socket, sys, socks
if 'before' in sys.argv:
    import concurrent.futures
    try:
        import _interpreters            # as concurrent.futures of Python 3.14 does
    except ImportError:
        pass
socks.set_default_proxy('socks5h://127.0.0.1:9')
socks.wrap_module(socket)
if 'middle' in sys.argv:
    import asyncio
socks.wrap_module(socket, dns=True)
import asyncio, concurrent.futures, multiprocessing
concurrent.futures.ThreadPoolExecutor(1).submit(int).result()
for name in '_interpreters', '_xxsubinterpreters', 'concurrent.interpreters':
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert 'bypass the proxy' in str(error), error
    else:
        raise SystemExit(name)
try:
    concurrent.futures.InterpreterPoolExecutor(1).submit(int).result()
except (AttributeError, ImportError):
    pass
else:
    raise SystemExit('InterpreterPoolExecutor')
"""
        for order in 'before', 'middle', 'after':
            done = run(sys.executable, '-W', 'ignore', '-c', script, order, cwd=compiled())
            self.assertEqual((done.returncode, done.stderr), (0, ''))


class WrongTimeTest(ClientCase):
    """What a program may do at the wrong time."""

    def test_connected_already(self):
        """A second connect() is an error; the destination sees nothing of it."""
        proxy = self.scripted(['050100', '0500', IP5, OK5])
        with socks.socksocket(proxy=self.url(proxy)) as sock:
            sock.connect(('1.2.3.4', 80))
            self.assertEqual(sock.connect_ex(('1.2.3.4', 80)), errno.EISCONN)
            self.check_echo(sock)
        origin = self.origin(echo)
        with socks.socksocket() as sock:
            sock.connect(origin.server_address)
            sock.set_proxy(self.url(proxy))
            self.assertEqual(sock.connect_ex(('1.2.3.4', 80)), errno.EISCONN)
        self.assertEqual(len(proxy.peers), 1)

    def test_closed_meanwhile(self):
        """By another thread; its descriptor's number may be somebody else's then."""
        proxy = self.origin()
        sock = socks.socksocket(proxy=self.url(proxy))
        errors = []

        def connect():
            try:
                sock.connect(('1.2.3.4', 80))
            except OSError as error:
                errors.append(error)

        with Background(connect):
            peer = proxy.take()
            self.assertEqual(peer.read(3), hexed('050100'))
            sock.close()
            mine, other = socket.socketpair()
            other.sendall(b'12')
            peer.send(b'\5\0')
            peer.sock.shutdown(socket.SHUT_RDWR)
        with mine, other:
            self.assertEqual(mine.recv(2), b'12')
            other.settimeout(0.05)
            with self.assertRaises(socket.timeout):
                other.recv(1)
        self.assertEqual(len(errors), 1)

    def test_closed_before_its_descriptor_is_replaced(self):
        """By another thread: what was to replace it is closed, too, and so the proxy's connection.
        """
        def serve(peer):
            with context.wrap_socket(peer.sock, server_side=True) if context else peer.sock as sock:
                peer.sock = sock
                peer.read(3)
                asked.set()
                closed.wait(PATIENCE)
                peer.send(b'\5\0')
                peer.read(10)
                peer.send(hexed(OK5))
                with contextlib.suppress(ConnectionResetError):
                    peer.rest()

        for kind, context in ((socket.SOCK_STREAM, server_context()), (socket.SOCK_DGRAM, None)):
            asked, closed, proxy = threading.Event(), threading.Event(), self.origin(serve)
            url = self.url(proxy, 'socks5h+tls' if context else 'socks5h') + '?udp=tcp' * (
                not context)
            sock = socks.socksocket(type=kind, proxy=url)
            sock.ssl_context = client_context()
            sock.settimeout(PATIENCE)
            connecting = Background(sock.connect, ('1.2.3.4', 80))
            self.assertTrue(asked.wait(PATIENCE))
            sock.close()
            closed.set()
            with self.assertRaises(OSError) as caught:
                connecting.result()
            self.assertEqual(caught.exception.errno, errno.EBADF)
            eventually(lambda: not any(thread.is_alive() for thread in proxy.threads[1:]))
            eventually(lambda: not socks.background_loop().items)

    def test_a_fork_has_a_tls_thread_of_its_own(self):
        proxy = self.scripted(['050100', '0500', IP5, OK5], tls=True)
        script = f"""
import os, socks, ssl, sys
context = ssl.create_default_context(cadata={CERTIFICATE!r})
socks.background_loop()
if not os.fork():
    sock = socks.create_connection(('1.2.3.4', 80), 5, ssl_context=context,
                                   proxy={self.url(proxy, 'socks5h+tls')!r})
    sock.sendall(b'hello')
    sys.stdout.write(sock.recv(5).decode())
    sys.exit()
os.wait()
"""
        done = run(sys.executable, '-W', 'ignore', '-c', script, cwd=compiled())
        self.assertEqual((done.stdout, done.stderr), ('hello', ''))

    @unittest.skipUnless(hasattr(os, 'register_at_fork'), 'needs Python 3.7')
    def test_a_fork_that_outlives_its_parent(self):
        """As a daemon does: its connection inside TLS ends with the parent, which carries it."""
        proxy = self.scripted(['050100', '0500', IP5, OK5], tls=True)
        script = f"""
import os, socks, ssl, sys
context = ssl.create_default_context(cadata={CERTIFICATE!r})
sock = socks.create_connection(('1.2.3.4', 80), {PATIENCE}, ssl_context=context,
                               proxy={self.url(proxy, 'socks5h+tls')!r})
goes_on, leave = os.pipe()
if os.fork():
    os.read(goes_on, 1)
    os._exit(0)
sock.sendall(b'hello')
assert sock.recv(5) == b'hello'
os.write(leave, b'x')
try:
    end = sock.recv(5)
except ConnectionResetError:
    end = b''
print(end)
"""
        done = run(sys.executable, '-W', 'ignore', '-c', script, cwd=compiled())
        self.assertEqual((done.stdout, done.stderr), ("b''\n", ''))

    def test_tls_of_a_socket_without_timeout(self):
        """Its blocking must not become that of the thread that carries TLS."""
        proxy = self.scripted(['050100', '0500', IP5, OK5], tls=True, last=lambda peer: None)
        with socks.socksocket(proxy=self.url(proxy, 'socks5h+tls')) as sock:
            sock.ssl_context = client_context()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            sock.connect(('1.2.3.4', 80))
            tunnels = [item for item in socks.background_loop().items if item.client]
            self.assertTrue(tunnels)
            for tunnel in tunnels:
                self.assertEqual(tunnel.down.source._sock.gettimeout(), 0)
                self.assertFalse(os.get_blocking(tunnel.down.source.fileno()))

    def test_tls_that_fails_is_given_up(self):
        """With all its descriptors, although the proxy stays."""
        proxy = self.scripted([], tls=True, last=be_silent)
        for _ in range(2):
            with self.assertRaises(GENERAL):
                socks.create_connection(('1.2.3.4', 80), 0.4, ssl_context=client_context(),
                                        proxy=self.url(proxy, 'socks5h+tls'))
        eventually(lambda: not socks.background_loop().items)

    def test_tls_through_a_socket_that_was_made_before(self):
        """With socket.socket replaced before ssl is imported, SSLSocket is one of ours."""
        proxy = self.scripted(['050100', '0500', f'05010003{NAME}01bb', OK5], last=serve_tls)
        script = f"""
import socket, socks
socket.socket = socks.socksocket
import ssl
context = ssl.create_default_context(cadata={CERTIFICATE!r})
for connect in ssl.SSLSocket.connect, ssl.SSLSocket.connect_ex:
    with socks.default_proxy({self.url(proxy)!r}):
        sock = context.wrap_socket(socket.socket(), server_hostname='localhost')
    assert not connect(sock, ('example.org', 443))
    sock.sendall(b'hello')
    assert sock.recv(5) == b'HELLO'
    sock.close()
"""
        done = run(sys.executable, '-W', 'ignore', '-c', script, cwd=compiled())
        self.assertEqual((done.returncode, done.stderr), (0, ''))

    def test_datagrams_of_a_bound_socket(self):
        """To a host that is bypassed, then to another; after a proxy that failed; by four threads.
        """
        server, target, direct = self.serve(), self.enter(Echo()), self.enter(Echo('127.0.0.1'))
        with socks.default_proxy(self.url(server), bypass='localhost'):
            sock = self.enter(socks.socksocket(type=socket.SOCK_DGRAM))
        sock.settimeout(PATIENCE)
        sock.sendto(b'x', ('localhost', direct.address.port))
        self.assertEqual(sock.recv(10), b'E:x')
        sock.sendto(b'y', target.address)
        self.assertEqual(sock.recvfrom(10), (b'E:y', tuple(target.address)))
        sock = self.enter(socks.socksocket(type=socket.SOCK_DGRAM))
        sock.set_proxy(f'socks5://127.0.0.1:{self.refused_port()}')
        with self.assertRaises(socks.ProxyConnectionError):
            sock.bind(('127.0.0.1', 0))
        sock.set_proxy(self.url(server))
        sock.settimeout(PATIENCE)
        threads = [Background(sock.sendto, b'z', target.address) for _ in range(4)]
        self.assertEqual([thread.result() for thread in threads], [1] * 4)
        self.assertEqual([sock.recv(10) for _ in threads], [b'E:z'] * 4)
        sock.close()
        with self.assertRaises(OSError) as caught:
            sock.recv(10)
        self.assertEqual(caught.exception.errno, errno.EBADF)

    def test_names_for_bypassed_hosts(self):
        """connect() sees what to bypass; bytes are names as well."""
        origin, server = self.origin(echo), self.serve()
        self.addCleanup(socks.unwrap_module, http.client)
        with socks.default_proxy(self.url(server), bypass='localhost 127.0.0.0/8'):
            socks.wrap_module(http.client, dns=True)
            with socket.create_connection(('localhost', origin.port)) as sock:
                self.assertIsNone(sock.get_proxy_peername())
            with socks.socksocket() as sock:
                sock.connect((b'127.0.0.1', origin.port))
                self.assertIsNone(sock.get_proxy_peername())
            with socks.socksocket(proxy=self.url(server, 'socks5')) as sock:
                sock.connect(('localhost', origin.port))    # looked up here, nevertheless
                self.check_echo(sock)
            with self.assertRaises(socket.gaierror):
                socket.getaddrinfo('not-a-number', 0, 0, 0, 0, socket.AI_NUMERICHOST)

    @unittest.skipUnless(sys.implementation.name == 'cpython', 'others collect later in any case')
    def test_frames_are_not_kept(self):
        """After a failure, nothing that the callers hold waits for the collector of cycles."""
        refused = '127.0.0.1', self.refused_port()
        request = Request(1, Address(*refused)).pack().hex()
        self.scripted_names(lambda name: [])
        proxies = [self.url(self.scripted(script, last=last), scheme) for script, last, scheme in (
            (['050100', '05ff'], leave, 'socks5h'), ([], leave, 'socks5h'),
            (['050100', '0500', request, '0505000105060708 0051'], leave, 'socks5h'),
            ([], be_silent, 'socks5h'), ([], leave, 'socks5h+tls'))]
        proxies.append('socks5h://%s:%d' % refused)

        def use(how, proxy):
            held = socks.socksocket(proxy=proxy)
            held.settimeout(0.2)
            with held, contextlib.suppress(OSError):
                how(held)
            return weakref.ref(held)

        async def connect(sock):
            with contextlib.suppress(OSError):
                await socks.open_connection(*refused, proxy=sock._proxies(), timeout=0.2)

        self.addCleanup(gc.enable)
        gc.disable()
        # In asyncio, direct connections and look-ups that fail make cycles of their own.
        for proxy, how in (*itertools.product([*proxies, 'socks5h://nowhere.test', []], (
                lambda sock: sock.connect(refused), lambda sock: sock.connect_ex(refused),
                lambda sock: socks.create_connection(refused, 0.2, proxy=sock._proxies()))),
                *((proxy, lambda sock: self.run_async(connect(sock))) for proxy in proxies)):
            with self.subTest(proxy, how=how):
                self.assertIsNone(use(how, proxy)())

    def test_inheritable(self):
        """A program may say so before its descriptor is replaced."""
        proxy = self.scripted(['050100', '0500', IP5, OK5], tls=True)
        for is_inheritable in False, True:
            with socks.socksocket(proxy=self.url(proxy, 'socks5h+tls')) as sock:
                sock.ssl_context = client_context()
                sock.set_inheritable(is_inheritable)
                sock.connect(('1.2.3.4', 80))
                self.assertEqual(sock.get_inheritable(), is_inheritable)

    @needs_ipv6
    def test_options_of_another_family(self):
        proxy = self.scripted(['050100', '0500', IP5, OK5], tls=True)
        with socks.socksocket(socket.AF_INET6, proxy=self.url(proxy, 'socks5h+tls')) as sock:
            sock.ssl_context = client_context()
            sock.connect(('1.2.3.4', 80))
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 5)
            self.check_echo(sock)

    def test_options_are_kept_once(self):
        with socks.socksocket() as sock:
            for number in range(1000):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, number % 2)
            self.assertEqual(len(sock._options), 1)

    def test_secrets_are_not_told(self):
        for url in ('socks5://u:SECRET\u2100@h:1', 'socks5://u:x[SECRET]@h',
                    b'socks5://u:SECRET@h'):
            with self.subTest(url), socks.socksocket() as sock:
                try:
                    sock.set_proxy(url)
                except (ValueError, GENERAL) as error:
                    self.assertNotIn('SECRET', str(error))
                self.assertNotIn('SECRET', repr(sock.proxy))


class EventQueue(asyncio.DatagramProtocol):
    """A protocol that keeps what it is called with: pairs of an event and its argument."""

    def __init__(self):
        self.events = asyncio.Queue()
        put = self.events.put_nowait
        self.connection_made = lambda transport: put(('made', transport))
        self.datagram_received = lambda data, sender: put(('received', (data, sender)))
        self.error_received = lambda error: put(('error', error))
        self.connection_lost = lambda error: put(('lost', error))
        self.pause_writing = lambda: put(('paused', None))
        self.resume_writing = lambda: put(('resumed', None))

    async def next(self):
        return await asyncio.wait_for(self.events.get(), PATIENCE)


class AsyncTest(ClientCase):
    """Without blocking."""

    def test_asyncio(self):
        server, origin = self.serve(users={'bob': 's'}), self.origin(echo)

        async def talk(**options):
            reader, writer = await socks.open_connection('localhost', origin.port, **options)
            writer.write(b'hello')
            self.assertEqual(await reader.readexactly(5), b'hello')
            writer.close()

        async def silence(proxy):
            url = self.url(proxy)
            turns = asyncio.ensure_future(asyncio.sleep(0.05))      # others go on meanwhile
            with self.assertRaises(socks.ProxyError) as caught:    # at any step
                await socks.open_connection('localhost', 80, proxy=url, timeout=0.2)
            self.assertIsInstance(caught.exception.socket_err, socket.timeout)
            self.assertTrue(turns.done())
            before = len(proxy.peers)
            task = asyncio.ensure_future(socks.open_connection('localhost', 80, proxy=url))
            while len(proxy.peers) == before:
                await asyncio.sleep(0)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        url = self.url(server, user='bob:s@')
        silent = self.scripted([], last=be_silent)
        tls = self.scripted(['050100', '0500', '050100 03 096c6f63616c686f7374%04x' % origin.port,
                             OK5], tls=True)
        for job in (talk(proxy=url), talk(proxy=[url, url]), talk(proxy=[]), talk(),
                    talk(proxy=self.url(tls, 'socks5h+tls'), ssl_context=client_context()),
                    silence(silent)):
            self.run_async(job)
        with self.assertRaises(socket.timeout):
            self.run_async(socks.open_connection('127.0.0.1', self.silent_port(), timeout=0.2))

    def test_a_slow_event_loop(self):
        """The timeout is for the network: a connection that is made is returned."""
        class SlowLoop(asyncio.SelectorEventLoop):
            async def create_connection(self, *args, **options):
                await asyncio.sleep(0.5)
                return await super().create_connection(*args, **options)

        async def talk():
            reader, writer = await socks.open_connection('127.0.0.1', origin.port, proxy=url,
                                                         timeout=0.4)
            writer.write(b'hello')
            self.assertEqual(await reader.readexactly(5), b'hello')
            writer.close()

        url, origin = self.url(self.serve()), self.origin(echo)
        with contextlib.closing(SlowLoop()) as loop:
            loop.run_until_complete(talk())

    async def endpoint(self, server, scheme='socks5h', hops=1, **options):
        """A transport and its protocol, an `EventQueue`."""
        return await socks.create_datagram_endpoint(
            EventQueue, proxy=[self.url(server, scheme)] * hops, **options)

    def test_endpoints(self):
        """By address and by name, connected and not, in the manner of asyncio's own."""
        server, target = self.serve(), self.enter(Echo())
        there = tuple(target.address)
        name = 'localhost', there[1]

        async def talk(options, sent_to):
            transport, protocol = await self.endpoint(server, **options)
            self.assertIsInstance(transport, asyncio.DatagramTransport)
            self.assertEqual(await protocol.next(), ('made', transport))
            remote = options.get('remote_addr')
            peer = transport.get_extra_info('peername')
            self.assertEqual(peer, remote and (remote if options.get('scheme') != 'socks5'
                                               else there))
            for data in b'x', bytearray(b'x'), memoryview(b'x'), b'':
                transport.sendto(data, sent_to)
                self.assertEqual(await protocol.next(),
                                 ('received', (b'E:' + bytes(data), sent_to or peer)))
            with self.assertRaises(TypeError):
                transport.sendto('x', sent_to)
            sockname = transport.get_extra_info('sockname')
            self.assertEqual(sockname, transport.get_extra_info('socket').getsockname())
            if remote:
                with self.assertRaises(ValueError):
                    transport.sendto(b'x', ('127.0.0.1', 1))
            self.assertIs(transport.get_protocol(), protocol)
            self.assertFalse(transport.is_closing())
            if sent_to == name:         # a second host, so an answer could be from either
                transport.sendto(b'x', there)
                self.assertEqual(await protocol.next(), ('received', (b'E:x', there)))
            transport.close()
            transport.close()
            self.assertTrue(transport.is_closing())
            transport.sendto(b'too late', sent_to)
            self.assertEqual(await protocol.next(), ('lost', None))
            self.assertLess(transport.get_extra_info('socket').fileno(), 0)

        for options, sent_to in (
                ({}, there), ({}, name), ({'scheme': 'socks5'}, name),
                ({'local_addr': ('127.0.0.1', 0)}, there), ({'remote_addr': there}, None),
                ({'remote_addr': there}, there), ({'remote_addr': name}, None),
                ({'remote_addr': name, 'scheme': 'socks5'}, None)):
            for hops in (1, 2):
                with self.subTest(options, sent_to=sent_to, hops=hops):
                    self.run_async(talk(dict(options, hops=hops), sent_to))

    def test_endpoints_over_ipv6(self):
        """The family decides how senders look, whatever the proxy's."""
        async def talk(server, echo, sender, **options):
            transport, protocol = await self.endpoint(server, **options)
            await protocol.next()
            transport.sendto(b'x', tuple(echo.address))
            self.assertEqual(await protocol.next(), ('received', (b'E:x', sender)))
            transport.abort()
            self.assertEqual(await protocol.next(), ('lost', None))

        six, four = self.enter(Echo('::1')), self.enter(Echo())
        for host in '127.0.0.1', '::1':
            server = self.serve(host=host)
            mapped = '::ffff:127.0.0.1', four.address.port, 0, 0
            for hops in (1, 2):
                self.run_async(talk(server, four, mapped, family=socket.AF_INET6, hops=hops))
                self.run_async(talk(server, six, (*six.address, 0, 0), local_addr=('::', 0),
                                    hops=hops))

    def test_an_endpoint_without_a_proxy(self):
        """It is asyncio's own, also for a bypassed host."""
        target = self.enter(Echo())

        async def talk(**options):
            transport, protocol = await socks.create_datagram_endpoint(
                EventQueue, remote_addr=tuple(target.address), **options)
            self.assertEqual(await protocol.next(), ('made', transport))
            transport.sendto(b'x')
            self.assertEqual((await protocol.next())[1][0], b'E:x')
            self.assertFalse(isinstance(transport, socks.Endpoint))
            transport.close()
            await protocol.next()

        self.run_async(talk())
        self.run_async(talk(proxy='', allow_broadcast=True))
        with socks.default_proxy('socks5h://127.0.0.1:1', bypass='127.0.0.1'):
            self.run_async(talk())

    def test_an_endpoint_that_bypasses(self):
        server, target, direct = self.serve(), self.enter(Echo()), self.enter(Echo('127.0.0.2'))

        async def talk():
            with socks.default_proxy(self.url(server), bypass='127.0.0.2'):
                transport, protocol = await socks.create_datagram_endpoint(EventQueue)
            await protocol.next()
            for echo in target, direct:
                transport.sendto(b'x', tuple(echo.address))
                self.assertEqual(await protocol.next(), ('received', (b'E:x', echo.address)))
            self.assertEqual(direct.senders[0][1], transport.get_extra_info('sockname')[1])
            transport.close()
            await protocol.next()

        self.run_async(talk())

    def test_an_endpoint_looks_names_up(self):
        """Without waiting for it; the order is kept for each name, and close() waits."""
        target, looked_up = self.enter(Echo()), self.slow_names()
        server, there = self.serve(), tuple(target.address)

        async def talk():
            transport, protocol = await self.endpoint(server, scheme='socks5')
            await protocol.next()
            transport.set_write_buffer_limits(high=3, low=1)
            self.assertEqual(transport.get_write_buffer_limits(), (1, 3))
            for data in b'one', b'two':
                transport.sendto(data, ('name.slow', 80))
            self.assertEqual(await protocol.next(), ('paused', None))
            self.assertEqual(transport.get_write_buffer_size(), 6)
            transport.sendto(b'x', there)
            self.assertEqual(await protocol.next(), ('received', (b'E:x', there)))
            transport.close()
            looked_up.set()
            kind, error = await protocol.next()
            self.assertEqual(kind, 'error')
            self.assertIsInstance(error, socket.gaierror)
            self.assertEqual(await protocol.next(), ('resumed', None))
            self.assertEqual(await protocol.next(), ('lost', None))
            # Without an end of the look-up.
            looked_up.clear()
            transport, protocol = await self.endpoint(server, scheme='socks5')
            transport.sendto(b'x', ('name.slow', 80))
            transport.abort()
            self.assertEqual([await protocol.next(), await protocol.next()],
                             [('made', transport), ('lost', None)])
            looked_up.set()

        self.run_async(talk())

    def test_errors_of_an_endpoint(self):
        server = self.serve(udp_timeout=0.2)

        async def wrong(transport, protocol, data, address):
            transport.sendto(data, address)
            kind, error = await protocol.next()
            self.assertEqual(kind, 'error')
            return error

        async def talk(hops):
            transport, protocol = await self.endpoint(server, hops=hops)
            await protocol.next()
            error = await wrong(transport, protocol, b'x', None)
            self.assertEqual(error.errno, errno.EDESTADDRREQ)
            error = await wrong(transport, protocol, bytes(65536), ('127.0.0.1', 9))
            self.assertEqual(error.errno, errno.EMSGSIZE)
            for address in (('', 1), ('localhost', 65536), 'localhost', ('a' * 300, 1)):
                self.assertIsInstance(await wrong(transport, protocol, b'x', address), GENERAL)
            with self.assertRaises(ValueError):
                transport.set_write_buffer_limits(1, 2)
            kind, error = await protocol.next()         # after the server's time-out
            self.assertEqual(kind, 'lost')
            self.assertIsInstance(error, GENERAL)
            self.assertIn('ended the UDP association', str(error))
            self.assertTrue(transport.is_closing())

        self.run_async(talk(1))
        self.run_async(talk(2))

    def test_an_endpoint_that_is_full(self):
        """The protocol pauses, and goes on when the proxy reads; close() sends what waits."""
        held, counted = threading.Event(), []

        def last(peer):
            held.wait()
            counted.append(len(peer.rest()))

        origin = self.origin(accept_datagrams(last))
        self.addCleanup(held.set)

        async def talk():
            transport, protocol = await self.endpoint(origin)
            await protocol.next()
            transport.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sent = 0
            while protocol.events.empty():
                transport.sendto(bytes(10000), ('1.2.3.4', 5))
                sent += 1
            self.assertEqual(await protocol.next(), ('paused', None))
            self.assertGreater(transport.get_write_buffer_size(), 1 << 16)
            transport.close()
            await asyncio.sleep(0)
            self.assertTrue(protocol.events.empty())
            held.set()
            self.assertEqual(await protocol.next(), ('resumed', None))
            self.assertEqual(await protocol.next(), ('lost', None))
            return sent

        sent = self.run_async(talk())
        self.assertEqual(eventually(lambda: counted), [sent * 10010])

    def test_endpoints_that_fail(self):
        server = self.serve()

        async def fail(expected, server, **options):
            with self.assertRaises(expected):
                await self.endpoint(server, **options)

        async def cancel(proxy):
            task = asyncio.ensure_future(self.endpoint(proxy))
            while not proxy.peers:
                await asyncio.sleep(0)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        class Broken(asyncio.DatagramProtocol):
            def connection_made(self, transport):
                raise ZeroDivisionError

        silent = self.scripted([], last=be_silent)
        self.run_async(fail(socks.ProxyError, silent, timeout=0.1))
        self.run_async(fail(OSError, server, local_addr=('127.0.0.1', 0), family=socket.AF_INET6))
        self.run_async(cancel(self.scripted([], last=be_silent)))
        with self.assertRaises(ZeroDivisionError):
            self.run_async(socks.create_datagram_endpoint(Broken, proxy=self.url(server)))

    def test_asyncio_and_datagrams(self):
        """asyncio's own endpoint; inside of TCP, it sees the end of the association, once."""
        server, target = self.serve(udp_timeout=0.2), self.enter(Echo())

        async def talk(hops):
            sock = socks.socksocket(type=socket.SOCK_DGRAM, proxy=[self.url(server)] * hops)
            sock.bind(('127.0.0.1', 0))
            transport, protocol = await asyncio.get_event_loop().create_datagram_endpoint(
                EventQueue, sock=sock)
            self.assertEqual((await protocol.next())[0], 'made')
            transport.sendto(b'x', tuple(target.address))
            self.assertEqual(await protocol.next(), ('received', (b'E:x', tuple(target.address))))
            if hops > 1:
                for send in (False, True):
                    if send:
                        transport.sendto(b'x', tuple(target.address))
                    kind, error = await protocol.next()
                    self.assertEqual(kind, 'error')
                    self.assertIsInstance(error, GENERAL)
                await asyncio.sleep(0)
                self.assertTrue(protocol.events.empty())
            transport.close()
            self.assertEqual(await protocol.next(), ('lost', None))

        self.run_async(talk(1))
        self.run_async(talk(2))

    def test_a_socket_that_does_not_block(self):
        """As asyncio and Telethon use one: connect() blocks nevertheless, and nothing after it."""
        server, origin = self.serve(), self.origin(echo)

        async def talk():
            loop = asyncio.get_event_loop()
            with socks.socksocket(proxy=self.url(server)) as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, ('127.0.0.1', origin.port))
                self.assertEqual(sock.gettimeout(), 0)
                await loop.sock_sendall(sock, b'hello')
                self.assertEqual(await loop.sock_recv(sock, 5), b'hello')

        self.run_async(talk())


@unittest.skipUnless(sys.platform == 'linux', 'connect() in the background is for Linux')
class BackgroundConnectTest(ClientCase):
    """connect() that does not block, as that of a stock socket."""

    def start(self, url, family=socket.AF_INET, target=('1.2.3.4', 80)):
        """A socket that connects."""
        sock = self.enter(socks.socksocket(family, proxy=url))
        sock.connect_blocks = False
        sock.setblocking(False)
        self.assertEqual(sock.connect_ex(target), errno.EINPROGRESS)
        return sock

    def ways(self, sock):
        """Functions that say whether the socket is writable, in the ways of the system; epoll has
        known its descriptor before."""
        epoll, edge = self.enter(select.epoll()), self.enter(select.epoll())
        epoll.register(sock, select.EPOLLIN | select.EPOLLOUT)
        edge.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        return [lambda seconds: bool(select.select([], [sock], [], seconds)[1]),
                lambda seconds: bool(ready([], [sock], seconds)),
                lambda seconds: bool(epoll.poll(seconds)), lambda seconds: bool(edge.poll(seconds))]

    def test_states(self):
        """As those of a stock socket, whatever it has been registered with before."""
        proxy = self.origin()
        for family in (socket.AF_INET, socket.AF_INET6) if HAS_IPV6 else (socket.AF_INET,):
            sock = self.enter(socks.socksocket(family, proxy=self.url(proxy)))
            sock.connect_blocks = False
            sock.setblocking(False)
            ways, number = self.ways(sock), sock.fileno()
            with self.assertRaises(BlockingIOError) as caught:
                sock.connect(('1.2.3.4', 80))
            self.assertEqual(caught.exception.errno, errno.EINPROGRESS)
            peer = self.enter(proxy.take())
            for expected, answer in (('050100', '0500'), (IP5, OK5)):
                self.assertEqual(peer.read(len(hexed(expected))), hexed(expected))
                # 40 ms is how long a system may delay what takes data out of the send buffer.
                self.assertEqual([way(0.06 if way is ways[0] else 0) for way in ways], [False] * 4)
                with self.assertRaises(BlockingIOError) as caught:
                    sock.connect(('1.2.3.4', 80))
                self.assertEqual(caught.exception.errno, errno.EALREADY)
                self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 0)
                with self.assertRaises(BlockingIOError):
                    sock.recv(1)
                with self.assertRaises(OSError) as caught:
                    sock.getpeername()
                self.assertEqual(caught.exception.errno, errno.ENOTCONN)
                peer.send(hexed(answer))
            self.assertEqual([way(PATIENCE) for way in ways], [True] * 4)
            self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 0)
            self.assertEqual(sock.connect_ex(('1.2.3.4', 80)), errno.EISCONN)
            self.assertEqual((sock.getpeername(), sock.get_proxy_sockname(), sock.fileno(),
                              sock.connect_error), (('1.2.3.4', 80), ('5.6.7.8', 81), number, None))
            self.assertEqual(sock.get_proxy_peername()[1], proxy.port)
            sock.send(b'hello')
            self.assertEqual(peer.read(5), b'hello')

    def test_failures(self):
        refused, server = self.refused_port(), self.serve(users={'bob': 's'})
        self.scripted_names(lambda name: [])
        for url, code, kind in (
                (self.url(server, user='bob:s@'), errno.ECONNREFUSED, socks.SOCKS5Error),
                (self.url(server, user='bob:x@'), errno.EACCES, AUTH),
                (f'socks5h://127.0.0.1:{refused}', errno.ECONNREFUSED,
                 socks.ProxyConnectionError),
                ('socks5h://nowhere.test', errno.EHOSTUNREACH, socks.ProxyConnectionError),
                (self.url(self.scripted(['050100', ''], last=leave)), errno.ECONNABORTED,
                 GENERAL)):
            with self.subTest(url):
                sock = self.start(url, target=('127.0.0.1', refused))
                self.assertTrue(ready([], [sock], PATIENCE))
                self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), code)
                self.assertEqual(sock.connect_ex(('127.0.0.1', refused)), code)
                self.assertIsInstance(sock.connect_error, kind)
                with self.assertRaises(kind):
                    sock.connect(('127.0.0.1', refused))
        self.addCleanup(setattr, socks, 'SETUP_TIMEOUT', socks.SETUP_TIMEOUT)
        socks.SETUP_TIMEOUT = 0.1
        sock = self.start(self.url(self.scripted([], last=be_silent)))
        self.assertTrue(ready([], [sock], PATIENCE))
        self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), errno.ETIMEDOUT)
        sock = self.enter(socks.socksocket(proxy=url))
        sock.connect_blocks = False
        sock.setblocking(False)
        with self.assertRaises(GENERAL):
            sock.connect(('a b', 80))           # known before anything is sent

    def test_closed_meanwhile(self):
        """The connection to the proxy ends, too, with the last copy of the socket."""
        proxy = self.origin()
        for copies in (lambda sock: [], lambda sock: [sock.dup()],
                       lambda sock: [sock.makefile('rb')]):
            sock = self.start(self.url(proxy))
            with proxy.take() as peer:
                self.assertEqual(peer.read(3), b'\5\1\0')
                for copy_or_sock in [sock, *copies(sock)]:
                    self.assertEqual(ready([peer.sock], [], 0.05), [])
                    copy_or_sock.close()
                self.assertEqual(peer.rest(), b'')

    def fill(self, sock):
        """Send until all buffers are full; the number of bytes."""
        sent = 0
        sock.setblocking(False)
        while ready([], [sock], 0.2):
            sent += sock.send(bytes(1 << 16))
        return sent

    def test_a_copy_is_closed_meanwhile(self):
        """What the program sends by another one arrives completely."""
        origin, server = self.origin(), self.serve()
        for make_copy in (socks.socksocket.dup,
                          lambda sock: socket.socket(fileno=os.dup(sock.fileno()))):
            sock = self.start(self.url(server), target=('127.0.0.1', origin.port))
            with make_copy(sock) as other:
                sock.close()
                self.assertTrue(ready([], [other], PATIENCE))
                sent = self.fill(other)
            self.assertEqual(len(origin.take().rest()), sent)

    def test_a_fork_closes_its_copy_meanwhile(self):
        origin, server = self.origin(), self.serve()
        script = f"""
import os, select, socks
sock = socks.socksocket(proxy={self.url(server)!r})
sock.connect_blocks = False
sock.setblocking(False)
sock.connect_ex(('127.0.0.1', {origin.port}))
if not os.fork():
    sock.close()
    os._exit(0)
os.wait()
select.select([], [sock], [])
sent = 0
while select.select([], [sock], [], 0.2)[1]:
    sent += sock.send(bytes(1 << 16))
sock.close()
print(sent, flush=True)
"""
        with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', script], cwd=compiled(),
                              stdout=subprocess.PIPE) as process:
            sent = int(process.stdout.readline())
            self.assertEqual(len(origin.take().rest()), sent)

    def test_the_program_ends(self):
        """What it has sent arrives nevertheless, also after a dialogue, which delays ACKs."""
        def talk(peer):
            data = peer.read(1)
            while data == b'?':
                peer.send(data)
                data = peer.read(1)
            received.append(data + peer.rest())

        received, origin, server = [], self.origin(talk), self.serve()
        script = f"""
import os, select, socks, sys
for number in range(40):
    if not os.fork():
        sock = socks.socksocket(proxy={self.url(server)!r})
        sock.connect_blocks = False
        sock.setblocking(False)
        sock.connect_ex(('127.0.0.1', {origin.port}))
        select.select([], [sock], [])
        sock.setblocking(True)
        for _ in range(number // 20 * 20):
            sock.send(b'?')
            sock.recv(1)
        for letter in b'hello':
            sock.send(bytes([letter]))
        if number % 2:
            sock.close()
        sys.exit()
    os.wait()
"""
        done = run(sys.executable, '-c', script, cwd=compiled())
        self.assertEqual((done.stdout, done.stderr), ('', ''))
        eventually(lambda: len(received) == 40)
        self.assertEqual(set(received), {b'hello'})

    def test_send_buffer(self):
        """Its size does not make the socket writable early, and is the program's in the end."""
        proxy, option = self.origin(), (socket.SOL_SOCKET, socket.SO_SNDBUF)
        for before, after in ((1 << 17, None), (None, 1 << 17), (1 << 12, 1 << 17)):
            sock = self.enter(socks.socksocket(proxy=self.url(proxy)))
            sock.connect_blocks = False
            sock.setblocking(False)
            if before:
                sock.setsockopt(*option, before)
            with socket.socket() as stock:
                stock.setsockopt(*option, after or before)
                expected = stock.getsockopt(*option)
            self.assertEqual(sock.connect_ex(('1.2.3.4', 80)), errno.EINPROGRESS)
            if after:
                sock.setsockopt(*option, after)
            with proxy.take() as peer:
                self.assertEqual(ready([], [sock], 0.06), [])
                for answer in '0500', OK5:
                    peer.sock.recv(100)
                    peer.send(hexed(answer))
                self.assertTrue(ready([], [sock], PATIENCE))
                self.assertEqual(sock.getsockopt(*option), expected)

    def test_data(self):
        """4 MiB each way at once, and each direction ends for itself."""
        origin, server = self.origin(), self.serve()
        sock = self.start(self.url(server), target=('127.0.0.1', origin.port))
        self.assertTrue(ready([], [sock], PATIENCE))
        far = self.enter(eventually(lambda: origin.peers and origin.peers.pop()))
        self.exchange(Peer(sock), far, 1 << 22)

    def test_reset(self):
        """SO_ERROR tells of a reset after connect() is done."""
        origin = self.origin(lambda peer: (peer.read(1), peer.reset()))
        sock = self.start(self.url(self.serve()), target=('127.0.0.1', origin.port))
        self.assertTrue(ready([], [sock], PATIENCE))
        sock.send(b'x')
        self.assertTrue(ready([sock], [], PATIENCE))
        self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), errno.ECONNRESET)

    def test_first_data(self):
        """sendto() that connects says whether it has taken the data, as with MSG_FASTOPEN."""
        for data in b'x', bytes(2000):
            origin = self.origin(echo)
            sock = self.enter(socks.socksocket(proxy=self.url(self.serve())))
            sock.connect_blocks, sent = False, 0
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sent = sock.sendto(data, ('127.0.0.1', origin.port))
            self.assertTrue(ready([], [sock], PATIENCE))
            sock.settimeout(PATIENCE)
            sock.sendall(data[sent:])
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(Peer(sock).rest(), data)

    @needs_ipv6
    def test_another_descriptor(self):
        """Where the program's socket cannot be connected to this process."""
        origin, server = self.origin(echo), self.serve(host='::1')
        with socks.socksocket(socket.AF_INET6, proxy=self.url(server)) as sock:
            sock.connect_blocks = False
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setblocking(False)
            sock.bind(('::1', 0))
            self.assertEqual(sock.connect_ex(('127.0.0.1', origin.port)), errno.EINPROGRESS)
            self.assertTrue(ready([], [sock], PATIENCE))
            sock.settimeout(PATIENCE)
            self.check_echo(sock)
            self.assertEqual(server.clients[0].address.host, '::1')

    def test_asyncio(self):
        """Many at once, through two proxies, the first one inside of TLS."""
        origin, refused = self.origin(echo), self.refused_port()
        context = server_context()
        chain = [self.url(self.serve(tls=context), 'socks5h+tls'), self.url(self.serve(), 'socks5')]

        async def talk(port, loop):
            with socks.socksocket(proxy=chain) as sock:
                sock.ssl_context, sock.connect_blocks = client_context(), False
                sock.setblocking(False)
                await loop.sock_connect(sock, ('127.0.0.1', port))
                await loop.sock_sendall(sock, b'hello')
                return await loop.sock_recv(sock, 100)

        async def talk_all():
            loop = asyncio.get_event_loop()
            return await asyncio.gather(*[talk(port, loop) for port in [origin.port] * 5 + [
                refused]], return_exceptions=True)

        *answers, error = self.run_async(talk_all())
        self.assertEqual(answers, [b'hello'] * 5)
        self.assertIsInstance(error, ConnectionRefusedError)

    def test_asyncio_of_a_program(self):
        """Where socket.socket is replaced, for all sockets."""
        origin, server = self.origin(echo), self.serve()
        self.addCleanup(setattr, socks.socksocket, 'connect_blocks', True)
        self.addCleanup(socks.unwrap_module, socket)
        socks.socksocket.connect_blocks = False

        async def talk():
            reader, writer = await asyncio.open_connection('127.0.0.1', origin.port)
            writer.write(b'hello')
            self.assertEqual(await reader.readexactly(5), b'hello')
            writer.close()

        with socks.default_proxy(self.url(server)):
            socks.wrap_module(socket)
            self.run_async(talk())
        eventually(lambda: any('done' in line for line in self.lines))


def tell_peer(peer):
    """Say where the connection comes from, and close."""
    peer.send(peer.sock.getpeername()[0].encode())
    peer.sock.shutdown(socket.SHUT_RDWR)


class InsideClient(ClientCase):
    """In a network namespace of our own, with 198.51.100.2, and fe80::1 on lo."""

    def test_zone_of_a_proxy(self):
        """It is kept in every way in."""
        there, port = ('1.2.3.4', 80), self.scripted(
            ['050100', '0500', IP5, OK5], host='fe80::1%lo').port
        url = f'socks5h://[fe80::1%25lo]:{port}'
        with socks.create_connection(there, PATIENCE, proxy=url) as sock:
            self.check_echo(sock)
        with socks.create_connection(there, PATIENCE, None, 2, 'fe80::1%lo', port) as sock:
            self.check_echo(sock)
        for family in socket.AF_INET, socket.AF_INET6:
            with socks.socksocket(family) as sock:
                sock.set_proxy(socks.SOCKS5, '[fe80::1%lo]', port)
                sock.connect(there)
                self.check_echo(sock)
                self.assertEqual(sock.get_proxy_peername()[3], socket.if_nametoindex('lo'))

        async def talk():
            reader, writer = await socks.open_connection(*there, proxy=url)
            writer.write(b'hello')
            self.assertEqual(await reader.readexactly(5), b'hello')
            writer.close()

        self.run_async(talk())
        done = subprocess.run(
            socks_py('-x', url, '--connect', '%s:%d' % there), input=b'hello',
            stdout=subprocess.PIPE, timeout=60)
        self.assertEqual(done.stdout, b'hello')

    def test_zone_of_a_relay(self):
        """BND says that it is on the proxy, in one way or another."""
        def associate(peer):
            for length, answer in ((3, '0500'), (10, f'050000 {bnd} {number:04x}')):
                peer.read(length)
                peer.send(hexed(answer))
            be_silent(peer)

        relay = self.enter(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        relay.bind(('fe80::1', 0, 0, socket.if_nametoindex('lo')))
        relay.settimeout(PATIENCE)
        number = relay.getsockname()[1]
        url = f"socks5h://[fe80::1%25lo]:{self.origin(associate, host='fe80::1%lo').port}"
        for family, bypass in ((socket.AF_INET, ''), (socket.AF_INET6, ''),
                               (socket.AF_INET6, '127.0.0.9')):
            for bnd in '01 00000000', '04 fe80 000000000000 0000000000000001', '03 0161':
                with self.subTest(family, bypass=bypass, bnd=bnd), \
                        socks.default_proxy(url, bypass), \
                        socks.socksocket(family, socket.SOCK_DGRAM) as sock:
                    sock.settimeout(PATIENCE)
                    sock.sendto(b'x', ('1.2.3.4', 80))
                    relay.sendto(*relay.recvfrom(100))
                    self.assertEqual(sock.recv(10), b'x')

    def test_source(self):
        """Connections to the proxy, and to what is bypassed, come from there."""
        server = self.serve(rules=(socks.parse_rule('allow to 127.0.0.0/8', 'here'),))
        origin = self.origin(tell_peer)
        source, there = '198.51.100.2', f'127.0.0.1:{origin.port}'
        script = self.enter(tempfile.NamedTemporaryFile('w', suffix='.py'))
        script.write(FROM_WHERE)
        script.flush()
        url = f'socks5h://{server.server_address}'
        for bypass, arguments, expected in (
                ('', ['--connect', there], '127.0.0.1'),
                ('127.0.0.0/8', ['--connect', there], source),
                ('', ['--run', script.name, there], '127.0.0.1\n' * 4),
                ('127.0.0.0/8', ['--run', script.name, there], f'{source}\n' * 4)):
            with self.subTest(arguments, bypass=bypass):
                del self.lines[:]
                done = run(*socks_py('--source', source, *arguments),
                           env=dict(os.environ, NO_PROXY=bypass, ALL_PROXY=url))
                self.assertEqual((done.stdout, done.stderr), (expected, ''))
                eventually(lambda: len(self.lines) == len(expected.split()) * (not bypass))
                self.assertEqual([line for line in self.lines if not line.startswith(source)], [])


FROM_WHERE = '''
import asyncio, socket, sys, socks
host, _, port = sys.argv[1].partition(':')
with socket.create_connection((host, int(port))) as sock:
    print(sock.recv(100).decode())
with socket.socket(socket.AF_INET6) as sock:
    sock.connect(('::ffff:' + host, int(port)))
    print(sock.recv(100).decode().replace('::ffff:', ''))
with socket.socket() as sock:
    assert not sock.connect_ex((host, int(port)))
    print(sock.recv(100).decode())
async def talk():
    reader, writer = await socks.open_connection(host, int(port))
    print((await reader.read()).decode())
    writer.close()
asyncio.new_event_loop().run_until_complete(talk())
'''


class DropInTest(ClientCase):
    """In the place of PySocks, and of stock sockets."""

    def test_without_a_proxy(self):
        """A stock socket: see also CPython's own tests, run with socket.socket replaced."""
        origin = self.origin(echo)
        with socks.socksocket() as sock, self.assertRaises(OSError) as caught:
            self.assertEqual(sock.proxy, (None,) * 6)
            sock.getpeername()
        self.assertEqual(caught.exception.errno, errno.ENOTCONN)
        with socks.create_connection(('localhost', origin.port)) as sock, sock.dup() as other:
            self.assertEqual(sock.getpeername(), origin.server_address)
            self.assertEqual(other.getpeername(), origin.server_address)
            self.check_echo(other)
        with socks.socksocket(fileno=socket.socket().detach()) as sock:
            self.assertEqual((sock.family, sock.type & 15), (socket.AF_INET, socket.SOCK_STREAM))
        with socks.default_proxy('socks5h://127.0.0.1:1'):
            for kind in ((socket.AF_UNIX, socket.SOCK_DGRAM), (socket.AF_UNIX, socket.SOCK_STREAM)):
                with socks.socksocket(*kind) as sock, self.assertRaises(FileNotFoundError):
                    sock.connect('/nowhere/at/all')
        saved = socket.getdefaulttimeout()
        self.addCleanup(socket.setdefaulttimeout, saved)
        socket.setdefaulttimeout(7)
        with socks.socksocket() as sock:
            self.assertEqual(sock.gettimeout(), 7)

    def test_keywords(self):
        """PySocks' methods take them, most stock ones do not."""
        server, origin = self.serve(), self.origin(echo)
        buffer = bytearray(5)
        with socks.create_connection(('127.0.0.1', origin.port), proxy=self.url(server)) as sock:
            self.assertEqual(sock.send(b'a', flags=0), 1)
            self.assertEqual(sock.recv(bufsize=5, flags=socket.MSG_PEEK), b'a')
            self.assertEqual(sock.recv_into(buffer, flags=socket.MSG_PEEK), 1)
            self.assertEqual(sock.recvfrom(5, flags=socket.MSG_PEEK)[0], b'a')
            self.assertEqual(sock.recvmsg(5, flags=socket.MSG_PEEK)[0], b'a')
            self.assertEqual(sock.recv(5), b'a')
            self.assertIsNone(sock.sendall(bytes=b'b'))
            self.assertEqual(sock.recv(5, flags=0), b'b')
            for wrong in {}, {'flags': 0}, {'bufsize': 5, 'other': 0}:
                with self.assertRaises(TypeError):
                    sock.recv(**wrong)

    def test_another_class_of_sockets(self):
        """One that takes no SOCK_NONBLOCK and asks a closed socket for nothing, as gevent's."""
        server, target = self.serve(), self.enter(Echo())
        proxy = self.scripted(['050100', '0500', IP5, OK5], tls=True)
        script = f"""
import socket, ssl
stock = socket.socket
class Other(stock):
    def __init__(self, family=2, type=1, proto=0, fileno=None):
        super().__init__(family, type & 0xF, proto, fileno)
    def __getattr__(self, name):
        raise OSError('closed') if self.fileno() < 0 else AttributeError(name)
socket.socket = Other
import socks
assert socks._orig_socket is Other
sock = socks.socksocket(type=socket.SOCK_DGRAM, proxy={self.url(server)!r})
sock.sendto(b'x', {tuple(target.address)!r})
assert sock.recv(10) == b'E:x'
sock.close()
context = ssl.create_default_context(cadata={CERTIFICATE!r})
sock = socks.create_connection(('1.2.3.4', 80), 5, ssl_context=context,
                               proxy={self.url(proxy, 'socks5h+tls')!r})
sock.sendall(b'hello')
assert sock.recv(5) == b'hello'
sock.close()
while socks.background_loop().items:
    pass
"""
        done = run(sys.executable, '-W', 'ignore', '-c', script, cwd=compiled())
        self.assertEqual((done.returncode, done.stderr), (0, ''))

    def test_default_proxy_of_a_subclass(self):
        origin, server = self.origin(echo), self.serve()

        class Proxied(socks.socksocket):
            default_proxy = (socks.SOCKS5, *server.server_address, True, None, None)

        with Proxied() as sock, socks.socksocket() as other:
            sock.connect(('127.0.0.1', origin.port))
            self.assertEqual(sock.get_proxy_peername(), tuple(server.server_address))
            self.assertIsNone(other.proxy[0])

    def test_subclasses(self):
        """One that overrides what we use ourselves, and one that reaches the proxy on its own."""
        class Strange(socks.socksocket):
            def recv(self, *args):
                raise AssertionError('the negotiation is none of its business')
            send = sendall = settimeout = recv

        origin, server = self.origin(echo), self.serve()
        with Strange(proxy=self.url(server)) as sock:
            sock.connect(('127.0.0.1', origin.port))
        with socks.socksocket() as sock:
            sock.connect(server.server_address)
            sock.set_proxy(self.url(server))
            self.assertEqual(sock._proxy_addr(), server.server_address)
            sock._negotiate_SOCKS5('127.0.0.1', origin.port)
            self.check_echo(sock)

    def test_names_of_pysocks(self):
        for name, value in (('SOCKS4', 1), ('SOCKS5', 2), ('HTTP', 3), ('PROXY_TYPE_SOCKS4', 1),
                            ('PROXY_TYPE_SOCKS5', 2), ('PROXY_TYPE_HTTP', 3),
                            ('PROXY_TYPES', {'SOCKS4': 1, 'SOCKS5': 2, 'HTTP': 3}),
                            ('PRINTABLE_PROXY_TYPES', {1: 'SOCKS4', 2: 'SOCKS5', 3: 'HTTP'}),
                            ('DEFAULT_PORTS', {1: 1080, 2: 1080, 3: 8080})):
            self.assertEqual(getattr(socks, name), value)
        self.assertEqual(list(socks.SOCKS5_ERRORS), list(range(1, 9)))
        self.assertEqual(list(socks.SOCKS4_ERRORS), [0x5b, 0x5c, 0x5d])
        self.assertIs(socks._orig_socket, socks._orgsocket)
        self.assertIs(socks.Socks5AuthError, socks.SOCKS5AuthError)
        self.assertGreaterEqual(socks.__version__, '1.7.1')
        for name in ('log', 'set_self_blocking', '_BaseSocket', 'socket', 'wrapmodule'):
            self.assertTrue(hasattr(socks, name), name)
        for name in ('setproxy', 'getproxysockname', 'getproxypeername', 'getpeername',
                     'get_peername', '_negotiate_SOCKS4', '_negotiate_HTTP'):
            self.assertTrue(hasattr(socks.socksocket, name), name)

        @socks.set_self_blocking
        def mode(sock):
            return sock.gettimeout()

        with socks.socksocket() as sock:
            sock.setblocking(False)
            self.assertEqual((mode(sock), sock.gettimeout()), (None, 0))


# A program that uses all that is public, for type checkers; `.ci/run` shows it to them.
TYPED_PROGRAM = '''\
"""A program that uses all of the public surface, for the type checkers."""
import asyncio
import http.client
import ipaddress
import pickle
import socket
import ssl
from typing import Any, Dict, Generator, List, Optional, Tuple, Union

import socks


class Strict(socks.Server):
    def authorize(self, client: socks.Session, target: socks.Address,
                  name: Optional[str] = None) -> None:
        super().authorize(client, target, name)
        if target.port != 443 or client.user == '-' or client.command != socks.Command.CONNECT:
            raise socks.Refused('only port 443')

    def verify_request(self, request: Union[socket.socket, Tuple[bytes, socket.socket]],
                       client_address: Any) -> bool:
        return True


class Recording(socks.Handler):
    asked: List[str] = []

    def do_CONNECT(self, request: Union[socks.Request, socks.Request4, socks.Request6]
                   ) -> Generator[Any, Any, Any]:
        self.asked.append(str(request.address))
        return (yield from super().do_CONNECT(request))


class Printing(asyncio.DatagramProtocol):
    def datagram_received(self, data: bytes, addr: Any) -> None:
        print(addr, data)


def proxy() -> socks.Proxy:
    return socks.parse_proxy_url('socks5h://h')


def serve() -> None:
    network = ipaddress.ip_network('127.0.0.0/8')
    rule = socks.parse_rule('allow to *', 'here')
    settings = socks.Settings(
        users={'bob': 'secret', b'eve': b'x'}, clients=(network,), rules=(rule,), idle_timeout=600,
        upstream=(socks.parse_proxy_url('socks5h://h'),), tls=ssl.create_default_context(),
        source=('127.0.0.1',), udp_ports=(1, 2))
    users_of_text: Dict[str, str] = {'bob': 'secret'}
    users_of_bytes: Dict[bytes, bytes] = {b'bob': b'secret'}
    lines: List[str] = ['deny to *']
    networks = [network]
    texts = socks.Settings(
        users=users_of_text, clients='127.0.0.0/8', trusted=['127.0.0.1', network], rules=lines,
        upstream='socks5h://10.0.0.1', balancers=networks, source='127.0.0.1',
        advertise=['127.0.0.1'], udp_ports='5000-5099', connect_timeout='5', max_clients='10')
    print(texts._replace(users=users_of_bytes, rules='deny to *', upstream=['http://h', proxy()]),
          socks.Settings(upstream=proxy(), rules=[rule, 'deny to *'], gssapi=[1]))
    with Strict(('127.0.0.1', 0), settings, Recording).start() as server:
        address: socks.Address = server.server_address
        strict: Strict = server
        users: List[str] = [client.user for client in strict.clients]
        print(address.host, address.port + 1, users, server.addresses[0].host)
        server.reconfigure(settings._replace(max_clients=5))
        server.shutdown()
    with socks.Server([('127.0.0.1', 0), ('::1', 0)]) as other:
        other.serve_forever()
    hashed: str = socks.Hashed.make(b'secret')
    print(hashed)


def messages() -> None:
    read, rest = socks.reader(b'\\5\\1\\0')
    greeting: socks.Greeting = socks.Greeting.unpack(read)
    left: bytes = rest()
    request = socks.Request(socks.Command.CONNECT, socks.Address('example.org', 80))
    packed: bytes = request.pack() + greeting.pack() + left
    for message in (socks.Choice(0), socks.Credentials(b'', b''), socks.Verdict(0),
                    socks.Response(socks.Reply.SUCCEEDED), socks.Response4.of(0),
                    socks.Request4(1, socks.Address('h', 1), b''), socks.GssMessage(1),
                    socks.Datagram(socks.Address('h', 1), b''), socks.ProxyHeader(),
                    socks.HttpConnect(socks.Address('h', 1)), socks.IdentQuery(1, 2)):
        packed += message.pack()
    text: str = socks.Reply.NOT_ALLOWED.text
    status: int = socks.HttpStatus.unpack(read).code
    kind: int = socks.GssMessage.TOKEN
    print(packed, text, status, kind, socks.Datagram.unpack(packed).payload,
          socks.ProxyHeader.unpack(read).source, socks.IdentReply.unpack(read).userid)


def errors() -> None:
    try:
        socks.create_connection(('example.org', 80), 5, proxy='socks5h://127.0.0.1:1')
    except (socks.ProxyTimeoutError, socks.ProxyConnectionTimeoutError, TimeoutError) as error:
        print(error)
    except (socks.SOCKS5AuthError, socks.SOCKS5Error, socks.SOCKS4Error, socks.HTTPError,
            socks.ProtocolError, socks.ProxyConnectionError, socks.GeneralProxyError) as error:
        cause: Optional[BaseException] = error.socket_err
        message: str = error.msg
        reply: int = error.reply
        proxy: Optional[socks.Proxy] = error.proxy
        target: Optional[socks.Address] = error.target
        print(cause, message, reply, proxy and proxy.addr, target and target.host, error.errno,
              pickle.dumps(error))
    except socks.ProxyError as error:
        raise socks.Refused('no', error, socks.Reply.NOT_ALLOWED) from error


def client() -> None:
    with socks.create_connection(
            ('example.org', 80), 5.0, ('', 0), socks.SOCKS5, 'h', 1080, True, 'bob', b'secret',
            [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]) as sock:
        data: bytes = sock.recv(5)
        count: int = sock.send(data)
        sock.sendall(data)
        print(count, sock.getpeername(), sock.get_proxy_sockname(), sock.get_proxy_peername())
    chain = ['socks5h://a', 'http://b']
    with socks.create_connection(('h', 1), proxy=chain, optimistic=True, data=b'x',
                                 ssl_context=ssl.create_default_context()) as sock:
        with sock.makefile('rb') as file, sock.dup() as other:
            print(file.readline(), other.fileno())
    with socks.create_server(('h', 0), proxy=chain, timeout=5) as waiting:
        peer, address = waiting.accept()
        peer.close()
        print(address[0], waiting.getsockname())
    with socks.socksocket(socket.AF_INET, socket.SOCK_DGRAM, proxy='socks5h://h') as sock:
        sock.set_proxy(socks.HTTP, 'h', 1, username='u', password='p')
        sock.set_proxy(chain, optimistic=True)
        sock.set_proxy()
        sock.setproxy(proxytype=socks.PROXY_TYPE_SOCKS4 | socks.OPTIMISTIC, addr='h')
        sock.ssl_context, sock.connect_blocks = ssl.create_default_context(), False
        failure: Optional[BaseException] = sock.connect_error
        print(failure)
        sock.settimeout(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        is_on: int = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        value: bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        sock.bind(('', is_on * len(value)))
        length: int = sock.sendto(b'x', ('h', 1)) + sock.sendto(b'x', 0, ('h', 1))
        payload, sender = sock.recvfrom(100)
        buffer = bytearray(100)
        got: int = sock.recv_into(buffer) + sock.recvfrom_into(buffer)[0] + sock.sendmsg([b'x'])
        code: int = sock.connect_ex(('h', 1))
        sock.connect(('h', 1))
        print(length, payload.decode(), sender, got, code, sock.recvmsg(10)[0],
              sock.recvmsg_into([buffer])[0], sock.proxy[1])
    socks.set_default_proxy(socks.SOCKS5, 'h', 1080, True, 'u', 'p', bypass='localhost')
    socks.set_default_proxy('socks5h://h')
    socks.set_default_proxy(chain)
    socks.setdefaultproxy(proxytype=2, addr='h')
    default = socks.get_default_proxy()
    print(default and default[1], socks.socksocket.default_proxy, socks.DEFAULT_PORTS[socks.HTTP],
          socks.PROXY_TYPES['SOCKS5'], socks.PRINTABLE_PROXY_TYPES[2], socks.SOCKS5_ERRORS[1])
    with socks.default_proxy('socks5h://h', bypass='10.0.0.0/8'), socks.default_proxy(None):
        socks.wrap_module(http.client, dns=True)
        socks.unwrap_module(http.client)
    url: Optional[str] = socks.proxy_from_environment('h', 80)
    proxy: socks.Proxy = socks.parse_proxy_url(url or 'socks5h://h')
    bypassed: bool = socks.is_bypassed('h', 'localhost', 80)
    print(proxy.addr, proxy.sure_port, bypassed, socks.getaddrinfo('h', 80)[0][4],
          socks.parse_chain(chain)[0].type, socks.main(['--version']))


async def talk() -> None:
    reader, writer = await socks.open_connection('h', 80, proxy='socks5h://h', timeout=5,
                                                 ssl=True, local_addr=('127.0.0.1', 0),
                                                 optimistic=True, data=b'x')
    writer.write(await reader.read(5))
    await writer.drain()
    transport: asyncio.DatagramTransport
    transport, protocol = await socks.create_datagram_endpoint(
        Printing, ('0.0.0.0', 0), family=socket.AF_INET, proxy='socks5h://h', timeout=5)
    transport.sendto(b'x', ('example.org', 53))
    printing: Printing = protocol
    _, protocol = await socks.create_datagram_endpoint(
        lambda: printing, remote_addr=('h', 53), proxy=[], ssl_context=None, allow_broadcast=True)
    transport.close()


if __name__ == '__main__':
    serve()
    messages()
    errors()
    client()
    asyncio.new_event_loop().run_until_complete(talk())
'''


class TypesTest(unittest.TestCase):

    def test_names(self):
        """The program for type checkers uses what there is, in the Python that this is."""
        compile(TYPED_PROGRAM, 'program', 'exec')
        for name in set(re.findall(r'\bsocks\.(\w+)', TYPED_PROGRAM)):
            self.assertTrue(hasattr(socks, name), name)

    def test_annotations(self):
        """Of all parameters and results of what programs call; those of a socket, too."""
        functions = [getattr(socks, name) for name in (
            'create_connection', 'create_server', 'open_connection', 'create_datagram_endpoint',
            'set_default_proxy',
            'setdefaultproxy', 'default_proxy', 'get_default_proxy', 'wrap_module',
            'unwrap_module', 'getaddrinfo', 'parse_proxy_url', 'proxy_from_environment',
            'is_bypassed', 'parse_chain', 'parse_rule', 'main')]
        for kind in (socks.socksocket, socks.Server, socks.ProxyError, socks.Proxy):
            for base in set(kind.__mro__) - {socket.socket} - set(socks.Server.__mro__[1:]):
                if base.__module__ == 'socks':
                    functions += [value for name, value in vars(base).items()
                                  if callable(value) and not name.startswith('_')]
        self.assertGreater(len(functions), 50)
        for function in functions:
            with self.subTest(function.__qualname__):
                names = {*inspect.signature(function).parameters, 'return'}
                self.assertEqual(names - {'self', 'args', 'kwargs', *function.__annotations__},
                                 set())
        self.assertEqual(socks.socksocket.recv.__annotations__['return'], bytes)


class NamesTest(unittest.TestCase):
    """What `import *` gives, and the names in the module's docstring."""

    PYSOCKS = """
        SOCKS4 SOCKS5 HTTP PROXY_TYPE_SOCKS4 PROXY_TYPE_SOCKS5 PROXY_TYPE_HTTP PROXY_TYPES
        PRINTABLE_PROXY_TYPES DEFAULT_PORTS SOCKS4_ERRORS SOCKS5_ERRORS ProxyError GeneralProxyError
        ProxyConnectionError SOCKS5AuthError SOCKS5Error SOCKS4Error HTTPError set_default_proxy
        setdefaultproxy get_default_proxy getdefaultproxy wrap_module wrapmodule create_connection
        socksocket set_self_blocking log""".split()         # of version 1.7.1

    def test_all_exist(self):
        self.assertEqual(len(set(socks.__all__)), len(socks.__all__))
        for name in socks.__all__:
            self.assertTrue(hasattr(socks, name), name)

    def test_all_is_what_programs_use(self):
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as file:
            examples = re.findall(r'```python\n(.*?)```', file.read(), re.DOTALL)
        used = set(re.findall(r'\bsocks\.(\w+)', '\n'.join([*examples, TYPED_PROGRAM])))
        self.assertIn('Server', used)
        self.assertEqual(used - {'getaddrinfo', *socks.__all__}, set())

    def test_star_import(self):
        """It gives the names of PySocks; in a new interpreter, where nothing else has them."""
        done = run(sys.executable, '-W', 'error', '-c',
                   'from socks import *\nprint(*globals())', cwd=compiled())
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        names = set(done.stdout.split())
        self.assertEqual({*self.PYSOCKS, *socks.__all__} - names, set())
        self.assertEqual({'socket', 'os', 'getaddrinfo'} & names, set())

    def test_module_docstring(self):
        """Its functions and classes exist, and its sections are those of the file, in order."""
        dotted = re.findall(r'\b([A-Z]\w+)\.([a-z_]\w*)', socks.__doc__)
        self.assertIn(('Tunnel', 'close'), dotted)
        for owner, name in dotted:
            self.assertTrue(hasattr(getattr(socks, owner), name), f'{owner}.{name}')
        paths = socks.__doc__.partition('\nPaths\n')[2].partition('\nConversations\n')[0]
        for name in (*re.findall(r'`(\w+)`', socks.__doc__),
                     *re.findall(r'(?<![.\w])\w+_\w+', paths)):
            self.assertTrue(any(hasattr(owner, name) for owner in (
                socks, socks.Server, socks.Handler)), name)
        places = socks.__doc__.partition('\nWhere to look\n')[2].partition('\nConversations\n')[0]
        for line in filter(None, places.splitlines()[1:]):
            for name in re.split(' {2,}', line)[1].split(', '):
                functools.reduce(getattr, name.split('.'), socks)
        with open(socks.__file__, encoding='utf-8') as file:
            sections = re.findall(r'^# -{20,} (.*)$', file.read(), re.MULTILINE)
        listed = socks.__doc__.partition('\nSections\n')[2].partition('\nPaths\n')[0]
        self.assertEqual(re.findall(r'^(\w+(?: \w+)?) {2,}', listed, re.MULTILINE), sections)


class ToolTest(Case):
    """The command line as a client."""

    def setUp(self):
        super().setUp()
        self.change(socks.log, propagate=False)     # stderr is for the client's lines

    def test_what_a_proxy_says_is_printable(self):
        for answer, shown in (('HTTP/1.1 403 \x1b[2Jno\r', r'403: \x1b[2Jno'),
                              ('HTTP/1.1 502 \x1b[2J\x9b\r', r'502: \x1b[2J\x9b ('),
                              ('HTTP/1.1 403 \x9b2J', r'403: \x9b2J')):
            scripted = self.enter(Scripted([HEAD, (answer + '\n\n').encode('latin-1').hex()]))
            with self.subTest(answer):
                status, out, err = in_process('-x', f'http://127.0.0.1:{scripted.port}',
                                              '--connect', 'example.org:80')
                self.assertEqual((status, out), (1, ''))
                self.assertRegex(err, r'^socks.py: [ -~]*\n$')
                self.assertIn(shown, err)

    def tool(self, *arguments, data='', command=None, **environment):
        """Exit status, stdout and stderr."""
        done = run(*(command or socks_py()), *arguments, input=data,
                   env=dict(os.environ, **environment))
        return done.returncode, done.stdout, done.stderr

    def test_connect(self):
        server, origin = self.serve(users={'bob': 's'}), self.origin(echo)
        url = f'socks5h://bob:s@{server.server_address}'
        near = {'NO_PROXY': '127.0.0.1'}
        for options, environment in (
                (('-x', url), {}), (('-x', url + '?optimistic=1', '-x', url), {}), ((), near),
                (('-x', url), near), ((), {'SOCKS_PROXY': url, **near}),
                ((), {'ALL_PROXY': url}), ((), {'ALL_PROXY': url, **near})):
            there = '127.0.0.1' if 'NO_PROXY' in environment else 'localhost'
            with self.subTest(options, environment=environment):
                environment = {'ALL_PROXY': '', 'NO_PROXY': '', **environment}
                self.assertEqual(self.tool(*options, '--connect', f'{there}:{origin.port}',
                                           data='some words', **environment),
                                 (0, 'some words', ''))
        eventually(lambda: len(self.lines) == 4)
        status, _, err = in_process('--connect', f'127.0.0.1:{origin.port}',
                                    NO_PROXY='example.org', ALL_PROXY='')
        self.assertEqual(status, 2)
        self.assertIn('--connect: expected a proxy, -x URL or ALL_PROXY, or 127.0.0.1 in', err)
        refused = self.refused_port()
        self.assertEqual(in_process('-x', url, '--connect', f'127.0.0.1:{refused}'),
                         (1, '', f'socks.py: 127.0.0.1:{refused}: Socket error: 0x05: Connection '
                                 f'refused (SOCKS5 proxy {server.server_address}, target '
                                 f'127.0.0.1:{refused})\n'))

    def test_connect_carries_bytes(self):
        """All of them, and the ends of both directions."""
        server, origin = self.serve(), self.origin()
        process = subprocess.Popen(
            socks_py('-x', f'socks5h://{server.server_address}', '--connect',
                     f'127.0.0.1:{origin.port}'), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process:
            peer = origin.take()
            down = Background(pour, peer, 8 << 20, 1)
            data = os.urandom(8 << 20)
            up = Background(lambda: (process.stdin.write(data), process.stdin.close()))
            received = Background(process.stdout.read)
            self.assertEqual(peer.rest(), data)
            up.result()
            self.assertEqual(hashlib.sha256(received.result()).hexdigest(), down.result())
        self.assertEqual(process.returncode, 0)

    def test_resolve(self):
        server = self.serve(tor_extensions=True)
        for scheme in ('socks4a', 'socks5', 'socks5h'):
            self.assertEqual(in_process('-x', f'{scheme}://{server.server_address}', '--resolve',
                                        'localhost'), (0, '127.0.0.1\n', ''))
        status, out, _ = self.tool('-x', f'socks5://{server.server_address}', '--resolve',
                                   '127.0.0.1')
        self.assertEqual((status, out), (0, socket.getnameinfo(('127.0.0.1', 0), 0)[0] + '\n'))

    def test_run(self):
        server, site = self.serve(), self.origin(serve_page)
        script = self.write('fetch.py', FETCH)
        self.write('helper.py', 'import urllib.request\n')
        url = f'http://localhost:{site.port}/'
        proxy = '-x', f'socks5h://{server.server_address}'
        self.assertEqual(self.tool(*proxy, '--run', script, url, '-v'),
                         (7, f"hello\n{[url, '-v']}\n", ''))
        eventually(lambda: len(self.lines) == 1)
        self.assertIn('CONNECT localhost:', self.lines[0])
        status, out, _ = self.tool(*proxy, '--run', '-m', 'this')
        self.assertEqual((status, out[:3]), (0, 'The'))
        wrong = self.write('wrong.py', 'int("no number")')
        status, _, err = self.tool(*proxy, '--run', wrong)
        self.assertEqual(status, 1)
        self.assertIn('Traceback', err)
        for program in (['-m', 'json.missing'], [os.path.dirname(script)]):
            status, _, err = self.tool(*proxy, '--run', *program)
            self.assertEqual((status, len(err.splitlines())), (1, 1), err)

    def test_run_to_the_end(self):
        """The program is `__main__`, also after its last line; a script, a module, a folder."""
        os.makedirs(self.place('package'))
        for name in ('last.py', 'package/__main__.py'):
            path = self.write(name, LAST_WORDS)
        for program in (['last.py', 'a'], ['-m', 'last', 'a'], ['-m', 'package', 'a'],
                        ['package', 'a']):
            with self.subTest(program):
                def end(*command):
                    done = run(sys.executable, *command, *program, cwd=self.folder)
                    return done.returncode, done.stdout, done.stderr

                status, out, err = end()
                self.assertEqual((status, err, len(out.splitlines())), (0, '', 4))
                self.assertEqual(end(SCRIPT, '-x', 'socks5h://h', '--run'), (status, out, err))

    def test_run_with_a_safe_path(self):
        """Python puts no folder before those of PYTHONPATH then."""
        script = self.write('path.py', 'import sys; print(sys.path)')
        for option in ('-I', '-P')[:1 + (sys.version_info >= (3, 11))]:
            self.assertEqual(self.tool('-x', 'socks5h://h', '--run', script,
                                       command=(sys.executable, option, SCRIPT)),
                             self.tool(script, command=(sys.executable, option)))

    def test_run_and_pickle(self):
        """What another process unpickles is looked for in the module socks."""
        path, script = self.place('kept'), self.write('keep.py', KEEP)
        status, _, err = self.tool('-x', 'socks5h://h', '--run', script, path)
        self.assertEqual((status, err), (0, ''))
        with open(path, 'rb') as file:
            error, function, proxy = pickle.load(file)
        self.assertRegex(repr(error), r"^SOCKS5Error\('a', TimeoutError\('b',?\)\)$")
        self.assertIs(function, socks.create_connection)
        self.assertEqual(proxy, socks.parse_proxy_url('socks5h://h'))

    @unittest.skipUnless(hasattr(os, 'set_blocking'), 'Windows')
    def test_connect_with_a_descriptor_that_does_not_block(self):
        """As another program may have left stdin."""
        server, origin = self.serve(), self.origin()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        with subprocess.Popen(socks_py('-x', f'socks5h://{server.server_address}', '--connect',
                                       f'127.0.0.1:{origin.port}'),
                              stdin=reading, stdout=subprocess.PIPE) as process:
            os.close(reading)
            peer = origin.take()
            peer.send(b'x')
            self.assertEqual(process.stdout.read(1), b'x')      # the thread for stdin has begun
            os.write(writing, b'hello')
            self.assertEqual(peer.read(5), b'hello')
            os.close(writing)
            self.assertEqual(peer.rest(), b'')
            peer.finish()
            self.assertEqual(process.wait(PATIENCE), 0)

    def test_run_with_children(self):
        """Processes of multiprocessing go the same way, and errors come back from them."""
        server, site = self.serve(), self.origin(serve_page, local_host())
        done = self.tool('-x', f'socks5h://{server.server_address}', '--source', '127.0.0.1',
                         '--run', self.write('parent.py', PARENT), str(site.port),
                         str(self.refused_port()),
                         command=(sys.executable, SCRIPT))
        methods = multiprocessing.get_all_start_methods()
        self.assertEqual(done, (0, ''.join(f'{method} hello SOCKS5Error socks\n'
                                           for method in sorted(methods)), ''))
        eventually(lambda: len(self.lines) == 2 * len(methods))
        self.assertEqual(sum('CONNECT localhost:' in line for line in self.lines),
                         2 * len(methods))

    @unittest.skipUnless(hasattr(sys, 'addaudithook'), 'needs Python 3.8')
    def test_nothing_else(self):
        """Neither a look-up nor a connection that is not the proxy's, whatever a program uses."""
        server, site = self.serve(), self.origin(serve_page, local_host())
        path = self.write('program.py', WATCHED)
        port = server.server_address.port
        self.assertEqual(
            self.tool('-x', f'socks5h://127.0.0.1:{port}', '--run', path, str(port),
                      str(site.port)), (0, 'hello hello\n', ''))
        eventually(lambda: len(self.lines) == 5)
        # They are logged at their end, which is later for some.
        self.assertEqual(sorted(line.split()[4] for line in self.lines if 'UDP' not in line),
                         [f'{host}:{site.port}:' for host in
                          ('ftp.invalid', 'localhost', 'localhost', 'mail.invalid')])


KEEP = '''
import pickle, socks, sys
assert socks.socksocket.__module__ == 'socks'
with open(sys.argv[1], 'wb') as file:
    pickle.dump((socks.SOCKS5Error('a', TimeoutError('b')), socks.create_connection,
                 socks.parse_proxy_url('socks5h://h')), file)
'''


PARENT = '''
import multiprocessing, socket, sys, urllib.request
from socket import socket as name_at_import

def work(site, refused):
    import socks
    assert name_at_import is socks.socksocket
    assert socks.socksocket.default_source == ('127.0.0.1',)
    with urllib.request.urlopen(f'http://localhost:{site}/') as page:
        answer = page.read().decode().strip()
    try:
        socket.create_connection(('localhost', refused))
    except OSError as error:
        return answer, error

if __name__ == '__main__':
    for method in sorted(multiprocessing.get_all_start_methods()):
        with multiprocessing.get_context(method).Pool(1) as pool:
            answer, error = pool.apply(work, sys.argv[1:])
            print(method, answer, type(error).__name__, type(error).__module__)
'''

WATCHED = '''
import asyncio, ftplib, smtplib, socket, sys, urllib.error, urllib.request
import logging.handlers
proxy, site = map(int, sys.argv[1:])

def watch(event, args):
    if event in ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr'):
        host = args[0] if isinstance(args[0], (str, type(None))) else args[0].decode()
        if host and host.strip('0123456789.'):
            print('look-up:', event, args)
    elif event == 'socket.getnameinfo' or event == 'socket.sendto':
        print(event, args)
    elif event == 'socket.connect' and args[1][1] != proxy and args[0].type == socket.SOCK_STREAM:
        print('connection:', args)

sys.addaudithook(watch)

async def fetch():
    reader, writer = await asyncio.open_connection('localhost', site)
    writer.write(b'GET / HTTP/1.0\\r\\n\\r\\n')
    data = await reader.read()
    writer.close()
    return data.split()[-1].decode()

def tried(function, *args):
    try:
        function(*args)
    except (OSError, EOFError, urllib.error.URLError):
        pass

first = asyncio.new_event_loop().run_until_complete(fetch())
with urllib.request.urlopen(f'http://localhost:{site}/') as page:
    print(first, page.read().decode().strip())
tried(urllib.request.urlopen, f'ftp://ftp.invalid:{site}/')
tried(smtplib.SMTP, 'mail.invalid', site)
logging.handlers.SysLogHandler(('log.invalid', 514)).emit(logging.makeLogRecord({'msg': 'x'}))
socket.getfqdn(), socket.getfqdn('x.invalid'), socket.getfqdn('192.0.2.1')
'''

LAST_WORDS = '''
import atexit, os, pickle, sys, threading

class State:
    pass

def keep():
    print(type(pickle.loads(pickle.dumps(State()))), __name__)

def wait():
    threading.main_thread().join()
    keep()

print(sys.argv, os.path.abspath(sys.path[0]), os.path.abspath(__file__))
print(sys.modules['__main__'].__dict__ is globals(), __package__, __spec__ and __spec__.name)
atexit.register(keep)
threading.Thread(target=wait).start()
'''

FETCH = '''
import sys, helper, socks
with helper.urllib.request.urlopen(sys.argv[1]) as page:
    print(page.read().decode(), end='')
print(sys.argv[1:])
sys.exit(7)
'''


# -------------------------------------------------------------------------------- administration

# Rules, and what becomes of requests: (user, client, command, name or '', address, port, outcome).
RULES = '''
# the first rule that matches decides
deny to 10.0.0.0/8\t# private, see page 80
allow connect user bob carl from 192.0.2.0/24 to .example.org 443 8000-8010
allow to host.example 198.51.100.7
deny to .forbidden.example
allow udp bind to 203.0.113.0/24
allow from ::1 to 2001:db8::/32
allow from ::ffff:192.0.2.9 to ::ffff:192.0.2.0/120
'''
JUDGED = [
    ('ann', '192.0.2.9', 'CONNECT', '', '192.0.2.1', 80, True),
    ('ann', '192.0.2.8', 'CONNECT', '', '192.0.2.1', 80, False),
    ('bob', '192.0.2.1', 'CONNECT', 'a.example.org', '203.0.113.1', 443, True),
    ('bob', '192.0.2.1', 'CONNECT', 'example.org', '203.0.113.1', 8005, True),
    ('bob', '192.0.2.1', 'CONNECT', 'a.example.org', '203.0.113.1', 80, False),
    ('bob', '192.0.2.1', 'CONNECT', 'a.example.org', '10.1.1.1', 443, False),
    ('bob', '192.0.2.1', 'CONNECT', 'badexample.org', '203.0.113.1', 443, False),
    ('eve', '192.0.2.1', 'CONNECT', 'a.example.org', '203.0.113.1', 443, False),
    ('bob', '192.0.3.1', 'CONNECT', 'a.example.org', '203.0.113.1', 443, False),
    ('bob', '192.0.2.1', 'BIND', 'a.example.org', '198.18.0.1', 443, False),
    ('-', '192.0.2.1', 'CONNECT', 'host.example', '203.0.113.1', 1, True),
    ('-', '192.0.2.1', 'CONNECT', 'sub.host.example', '203.0.113.1', 1, False),
    ('-', '192.0.2.1', 'CONNECT', '', '198.51.100.7', 1, True),
    ('-', '192.0.2.1', 'CONNECT', 'x.forbidden.example', '198.51.100.7', 1, True),
    ('-', '192.0.2.1', 'UDP_ASSOCIATE', '', '203.0.113.1', 53, True),
    ('-', '192.0.2.1', 'UDP_ASSOCIATE', 'x.example', '203.0.113.1', 53, True),
    ('-', '192.0.2.1', 'CONNECT', '', '203.0.113.1', 53, False),
    ('-', '::1', 'CONNECT', '', '2001:db8::1', 80, True),
    ('-', '192.0.2.1', 'CONNECT', '', '2001:db8::1', 80, False),
    ('-', '192.0.2.1', 'CONNECT', 'host.example', '64:ff9b::a00:1', 1, False),
    ('-', '192.0.2.1', 'CONNECT', 'host.example', '2002:a00:1::1', 1, False),
    ('-', '192.0.2.1', 'CONNECT', '', '64:ff9b::c633:6407', 1, False),
]

# What a rule allows, a target, and whether a client from elsewhere may reach it.
OPENED = [
    ('*', '127.0.0.1', False), ('0.0.0.0/0', '127.0.0.1', False), ('::/0', '::1', False),
    ('10.0.0.0/8', '127.0.0.1', False), ('127.0.0.0/8', '127.0.0.1', True),
    ('127.0.0.1', '127.0.0.1', True), ('::ffff:127.0.0.0/104', '127.0.0.1', True),
    ('126.0.0.0/7', '127.0.0.1', False), ('169.254.169.254', '169.254.169.254', True),
    ('100.64.0.0/10', '100.100.100.200', False), ('100.100.100.200', '100.100.100.200', True),
    ('fd00::/8', 'fd00:ec2::254', False), ('fd00::/8', 'fd00::1', True),
    ('64:ff9b::/96', '64:ff9b::7f00:1', False), ('64:ff9b::/96', '64:ff9b::102:304', True),
    ('64:ff9b::7f00:0/104', '64:ff9b::7f00:1', True), ('2002::/16', '2002:7f00:1::', False),
    ('127.0.0.0/8', '64:ff9b::7f00:1', False), ('2002:7f00::/24', '2002:7f00:1::', True),
    ('64:ff9b:1::/48', '64:ff9b:1::7f00:1', False), ('10.0.0.0/8', '10.0.0.1', True),
    ('64:ff9b:1::7f00:1', '64:ff9b:1::7f00:1', True), ('fe80::/16', 'fe80::1', True),
    ('127.0.0.0/8 0.0.0.0/0', '127.0.0.1', True), ('0.0.0.0/0', '1.2.3.4', True),
]

WRONG_RULES = [
    ('permit to *', "f:1: 'permit', expected allow or deny"),
    ('bob:secret', r"f:1: 'bob', expected allow or deny$"),
    ('\n\nallow', 'f:3: expected "to"'), ('allow to', 'f:1: expected "to"'),
    ('allow to 80', 'f:1: expected "to"'), ('allow * to x', r"f:1: '\*', expected connect, bind"),
    ('allow from x to *', "f:1: 'x', expected a network"),
    ('allow to 10.0.0.0/33', "f:1: '10.0.0.0/33', expected a network"),
    ('deny to 10.0.0.1/8', "f:1: '10.0.0.1/8', expected 10.0.0.0/8 for the network, or 10.0.0.1 f"),
    ('deny from fd00::1/8 to *', "f:1: 'fd00::1/8', expected fd00::/8 for the network, or fd00::1"),
    ('deny to fe80::1%lo', "f:1: 'fe80::1%lo', expected no zone"),
    ('deny to fe80::%lo/64', "f:1: 'fe80::%lo/64', expected no zone"),
    ('allow to * port 80', "f:1: 'port' is not expected here; ports are numbers, as in: to \\* 80"),
    ('allow to a.example ports 80', "f:1: 'ports' is not expected here; ports are numbers"),
    ('allow to 10.8.0.2:80', "f:1: '10.8.0.2:80', expected the port as the next word: 10.8.0.2 80"),
    ('allow to [::1]:80', r"f:1: '\[::1\]:80', expected the port as the next word: \[::1\] 80"),
    ('allow to a.example:80', "f:1: 'a.example:80', expected the port as the next word: a.exam"),
    ("deny user 'Bob Smith to *", "f:1: 'Bob: expected a closing ', then a space"),
    ('deny user "Bob" to "*', 'f:1: "\\*: expected a closing ", then a space'),
    ("deny user 'a'b to *", "f:1: 'a'b: expected a closing '"),
    ('deny resolve to * 53', 'f:1: resolve has no port, so this never matches'),
    ('allow to * 70000', "f:1: '70000', expected PORT or LOW-HIGH"),
    ('allow to * 5-4', "f:1: '5-4', expected PORT or LOW-HIGH"),
    ('allow to * x.example', 'f:1: expected "to", then networks and names or else \\*; ports are'),
    ('allow to a%b', 'f:1: host name a%b'),
    ('deny to *.example.org', r"f:1: '\*.example.org', expected a network, a name, .suffix, or "),
    ('deny to 10.0.0.*', r"f:1: '10.0.0.\*', expected a network"),
    ('deny to 300.1.1.1', "f:1: '300.1.1.1', expected a network"),
    ('deny to 127.1', "f:1: '127.1', expected a network"),
    ('allow user to *', "f:1: 'to' is not expected here"),
    ('allow from to *', "f:1: 'to' is not expected here"),
    ('allow to .example.org user bob', "f:1: 'user' is not expected here"),
    ('allow to 10.0.0.0/8 from 192.0.2.0/24', "f:1: 'from' is not expected here"),
]


class FileCase(Case):

    def rules(self, text):
        return socks.read_rules(self.write('rules', text))


class LookUpTest(FileCase):
    """The look-ups of a server."""

    def setUp(self):
        super().setUp()
        self.set(socks, 'HOSTS_FILE', self.write('hosts', '127.0.0.1 localhost # x.test\n'))
        self.set(socks, 'RESOLV_CONF', self.write('resolv.conf', 'nameserver 192.0.2.1\n'))
        self.set(socket, 'gethostname', lambda: 'host')
        socks.has_search_list.cache_clear()
        self.addCleanup(socks.has_search_list.cache_clear)

    def set(self, owner, name, value):
        self.addCleanup(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def ask(self, server, host, port, source='127.0.0.1'):
        """The reply to one CONNECT."""
        with Peer(server.server_address, (source, 0)) as peer:
            return peer.connect(host, port).reply

    def test_families(self):
        """The first answer starts, whatever becomes of the other one."""
        event = threading.Event()
        self.addCleanup(event.set)

        def find(name, family):
            if name.startswith('no6' if family == socket.AF_INET6 else 'no4'):
                event.wait(PATIENCE)
            elif name.startswith('bad'):
                raise socket.gaierror(socket.EAI_AGAIN, 'try again')
            return {'no6.test': ['127.0.0.1'], 'no4.test': ['::1'], 'bad.test': [], 'none.test': [],
                    'both.test': ['127.0.0.1', '::1']}[name]

        asked = self.names(find)
        server, origin = self.serve(connect_timeout=PATIENCE), self.origin(echo)
        for name, reply in (('no6.test', 0), ('both.test', 0), ('bad.test', Reply.GENERAL_FAILURE),
                            ('none.test', Reply.HOST_UNREACHABLE)):
            with self.subTest(name):
                self.assertEqual(self.ask(server, name, origin.port), reply)
                self.assertEqual(sorted(asked), [(name, 2), (name, socket.AF_INET6)])
                asked.clear()
        self.assertFalse(event.is_set())
        with contextlib.suppress(OSError):              # no IPv6 here
            six = self.origin(echo, host='::1')
            self.assertEqual(self.ask(server, 'no4.test', six.port), 0)

    def test_order(self):
        """IPv6 first where there is a way to it, but not what comes after IPv4 by RFC 6724."""
        four = ['192.0.2.%d' % number for number in range(20)]
        for six in 'fd00::1', '2002::1', '2001::1':
            self.assertEqual(socks.preferred([six, *four]), [four[0], six, *four[1:15]])
        with contextlib.suppress(OSError), Origin(host='::1'):
            self.assertEqual(socks.preferred(['127.0.0.1', '::1']), ['::1', '127.0.0.1'])
        self.assertEqual(socks.preferred(four), four[:16])

    def test_an_error_does_not_hide_the_other_family(self):
        second = threading.Event()

        def find(name, family):
            if family == socket.AF_INET6:
                second.set()
                raise socket.gaierror(socket.EAI_AGAIN, 'try again')
            second.wait(PATIENCE)
            time.sleep(0.1)             # longer than the delay for a second answer
            return ['127.0.0.1']

        self.names(find)
        self.assertEqual(self.ask(self.serve(), 'a.test', self.origin(echo).port), 0)

    def test_a_family_that_never_answers(self):
        """It takes few threads, and no time from those who ask next."""
        event = threading.Event()
        self.addCleanup(event.set)

        def find(name, family):
            if family == socket.AF_INET6:
                event.wait(PATIENCE)
            return ['127.0.0.1']

        asked = self.names(find)
        server, origin = self.serve(), self.origin(echo)
        resolver = server.resolver
        for number in range(30):
            self.assertEqual(self.ask(server, '%d.test' % number, origin.port), 0)
        eventually(lambda: [family for _, family in asked].count(socket.AF_INET6)
                   == 3 + resolver.FOLLOWING)
        self.assertEqual(list(resolver._late.values()), [3])
        event.set()                     # late, but not forgotten
        eventually(lambda: not resolver._busy)
        self.assertEqual([family for _, family in asked].count(socket.AF_INET6), 30)
        numbers = itertools.count()
        eventually(lambda: self.ask(server, 'a%d.test' % next(numbers), origin.port) == 0
                   and not resolver._late)

    def test_a_late_family_is_that_of_one_client(self):
        """Others have both families of each name, and the client has them later."""
        event, answers = threading.Event(), threading.Event()
        self.addCleanup(event.set)
        self.addCleanup(answers.set)

        def find(name, family):
            if family == socket.AF_INET and name.startswith('half'):
                event.wait(PATIENCE)
            elif family == socket.AF_INET and name.startswith('both'):
                answers.wait(PATIENCE)
            return ['127.0.0.1'] if family == socket.AF_INET else ['::1']

        def hosts(key):
            answer = resolver._answers.get(key)
            return sorted(answer.hosts) if answer else []

        self.names(find)
        self.change(socks.Resolver, DELAY=0.2)
        server = self.serve(tor_extensions=True)
        resolver = server.resolver

        def ask(name, source):
            peer = self.enter(Peer(server.server_address, (source, 0)))
            peer.begin(0xF0, Address(name, 0))
            return peer

        for number in range(3):
            self.assertEqual(Response.unpack(ask(f'half{number}.test', '127.0.0.2').read).reply, 0)
        late = ask('both.test', '127.0.0.2')
        self.assertEqual(Response.unpack(late.read).address.host, '::1')
        self.assertEqual(hosts('both.test'), [])
        answers.set()
        key = socks.client_key('127.0.0.2'), 'both.test'
        eventually(lambda: hosts(key) == ['127.0.0.1', '::1'])
        for name in 'both.test', 'other.test':
            with self.subTest(name):
                self.assertEqual(Response.unpack(ask(name, '127.0.0.3').read).reply, 0)
                eventually(lambda: hosts(name) == ['127.0.0.1', '::1'])

    def test_a_family_without_a_thread(self):
        """It follows, as soon as there is one."""
        class Asking:
            answers = []

            def is_waiting_for(self, _):
                return True

            def answer(self, _, hosts, error):
                self.answers.append((hosts, error))

        asked = self.names(lambda *_: ['127.0.0.1', '::1'])
        pool = socks.BlockingPool(1)
        self.addCleanup(pool.dismiss)
        resolver = socks.Resolver(pool)
        resolver.ask('a', Asking(), socks.LookUp('both.test'))
        eventually(lambda: resolver._answers and len(resolver._answers['both.test'].hosts) == 2)
        self.assertEqual(len(asked), 2)
        self.assertEqual(Asking.answers, [(['127.0.0.1'], None)])

    def test_one_look_up_for_all_who_ask(self):
        event = threading.Event()
        self.addCleanup(event.set)
        asked = self.names(lambda *_: event.wait(PATIENCE) and ['127.0.0.1'])
        server, origin = self.serve(), self.origin(echo)
        peers = [self.enter(Peer(server.server_address, (source, 0)))
                 for source in ['127.0.0.1', '127.0.0.2'] * 35]
        for peer in peers:
            peer.begin(1, Address('Dead.test', origin.port))
        eventually(lambda: len(server.resolver._queries) == 1
                   and len(server.resolver._queries['dead.test'].waiting) == 70)
        peers.pop().sock.close()        # who leaves does not stop it
        event.set()
        for peer in peers:
            self.assertEqual(Response.unpack(peer.read).reply, 0)
        self.assertEqual(sorted(asked), [('dead.test', 2), ('dead.test', socket.AF_INET6)])
        self.assertEqual(server.resolver._queries, {})

    def test_memory(self):
        """It serves for a while, is renewed while in use, and is bounded."""
        hosts = ['127.0.0.1']
        asked = self.names(lambda name, _: hosts)
        server, origin = self.serve(), self.origin(echo)
        resolver = server.resolver
        for _ in range(3):
            self.assertEqual(self.ask(server, 'a.test', origin.port), 0)
        self.assertEqual(len(asked), 2)
        resolver._answers['a.test'] = resolver._answers['a.test']._replace(renewal=0)
        hosts[:] = ['127.0.0.3']
        self.assertEqual(self.ask(server, 'a.test', origin.port), 0)    # by the old address
        eventually(lambda: resolver._answers['a.test'].hosts == ['127.0.0.3'])
        self.assertEqual(len(asked), 4)
        resolver._answers['a.test'] = resolver._answers['a.test']._replace(renewal=0)
        hosts.clear()
        self.assertEqual(self.ask(server, 'a.test', self.origin(echo, host='127.0.0.3').port), 0)
        eventually(lambda: resolver._answers['a.test'].renewal)         # in vain: it serves on
        self.assertEqual(resolver._answers['a.test'].hosts, ['127.0.0.3'])
        server.reconfigure(server.settings)
        for _ in range(2):
            self.assertEqual(self.ask(server, 'a.test', origin.port), Reply.HOST_UNREACHABLE)
        self.assertEqual(len(asked), 8)
        self.set(socks.Resolver, 'LIMIT', 2)
        for name in 'bcd':
            self.ask(server, name + '.test', origin.port)
        self.assertEqual(list(resolver._answers), ['c.test', 'd.test'])

    def test_both_families_of_a_name_are_one_host(self):
        """The table of hosts overrides both, and a search list may not find them apart."""
        asked = self.names(lambda name, family: None if name == 'localhost' else
                           ['127.0.0.1'] if name in ('x.test', 'db') else [])
        hosts = '127.0.0.1 localhost\n127.0.0.1 a.test X.test\n'
        origin, both = self.origin(echo), socket.AF_INET6
        for conf, table, name, reply, looked_up in (
                ('search corp.example', '', 'x.test', 0, [('x.test.', 2), ('x.test.', both)]),
                ('search corp.example', '', 'y.test', 4,
                 [('y.test.', 2), ('y.test.', both), ('y.test', 0)]),
                ('search corp.example', '', 'y.test.', 4, [('y.test.', 2), ('y.test.', both)]),
                ('search corp.example', '', 'db', 0, [('db', 0)]),
                ('search corp.example', hosts, 'x.test.', 0, [('x.test', 0)]),
                ('', hosts, 'x.test', 0, [('x.test', 0)]),
                ('', '', 'db.', 0, [('db.', 2), ('db.', both)]),
                ('', '', 'db', 0, [('db', 2), ('db', both)]),
                ('', '', 'localhost', 0, [('localhost', 0)])):
            self.set(socks, 'RESOLV_CONF', self.write('resolv.conf', conf))
            self.set(socks, 'HOSTS_FILE', self.write('hosts', table))
            socks.has_search_list.cache_clear()
            socks.hosts_file_names.cache_clear()
            with self.subTest(conf=conf, table=table, name=name):
                self.assertEqual(self.ask(self.serve(), name, origin.port), reply)
                self.assertEqual(sorted(asked), sorted(looked_up))
            asked.clear()

    def test_rules_and_search_lists(self):
        """With rules, none is used: what is found would not be what was judged."""
        self.set(socks, 'RESOLV_CONF', self.write('resolv.conf', 'search corp.test'))
        asked = self.names(lambda name, family: [])
        server = self.serve(rules=self.rules('deny to secret.corp.test\nallow to *'))
        for name in ('secret', 'secret.corp.test', 'a.test'):
            self.assertNotEqual(self.ask(server, name, 80), 0)
        self.assertEqual({name for name, _ in asked}, {'secret.', 'a.test.'})


    def test_what_says_nothing_about_the_name_is_not_remembered(self):
        """A lack of descriptors, or a bug; neither for those who ask next."""
        errors = []

        def find(name, family):
            if errors and (family == socket.AF_INET6 or name != 'half.test'):
                raise errors.pop()
            return ['127.0.0.1', '::1']

        self.names(find)
        server, origin = self.serve(), self.origin(echo)
        for number, error in enumerate((OSError(errno.EMFILE, 'none'), ZeroDivisionError())):
            errors[:] = [error, error]
            name = f'{number}.test'
            self.assertEqual(self.ask(server, name, origin.port), Reply.GENERAL_FAILURE)
            self.assertEqual(self.ask(server, name, origin.port), 0)
        self.assertIn('this is a bug', self.bugs.records.pop().getMessage())
        self.bugs.records.clear()
        errors[:] = [OSError(errno.EMFILE, 'none')]     # for one family only
        self.assertEqual(self.ask(server, 'half.test', origin.port), 0)
        self.assertEqual(len(server.resolver._answers['half.test'].hosts), 1)
        self.assertEqual(self.ask(server, 'half.test', origin.port), 0)
        eventually(lambda: len(server.resolver._answers['half.test'].hosts) == 2)
        errors[:] = [OSError(errno.EMFILE, 'none'), OSError(errno.EMFILE, 'none')]
        client, target = self.enter(Associate(server)), self.enter(Echo())
        datagram = Datagram(Address('udp.test', target.address.port), b'x').pack()
        relay = self.relay_in(server)
        client.send(datagram)
        eventually(lambda: relay.dropped)
        self.assertEqual(client.ask(datagram)[-3:], b'E:x')

    def test_what_is_no_name_is_not_looked_up(self):
        """By none of the commands, in no version."""
        asked = self.names(lambda *_: ['127.0.0.1'])
        server = self.serve(tor_extensions=True, connect_timeout=PATIENCE)
        client = self.enter(Associate(server))
        for host in ('a\\.test', 'a/.test', 'x.oni\\111n', '[a.test]', 'a%.test', '\u00df.test'):
            name = host.encode()
            client.send(b'\0\0\0\3' + bytes([len(name)]) + name + b'\0\x09x')
            for command in b'\1\2\xf0':
                with self.subTest(host, command=command), Peer(server.server_address) as peer:
                    peer.send(b'\5\1\0' + bytes([5, command, 0, 3, len(name)]) + name + b'\0\x09')
                    peer.read(2)
                    self.assertEqual(Response.unpack(peer.read).reply, Reply.GENERAL_FAILURE)
                with self.subTest(host, command4=command), Peer(server.server_address) as peer:
                    peer.send(bytes([4, command, 0, 9, 0, 0, 0, 1, 0]) + name + b'\0')
                    self.assertEqual(Response4.unpack(peer.read).code, 0x5b)
        relay = self.relay_in(server)
        eventually(lambda: relay.dropped == 6)
        self.assertEqual(asked, [])

    def test_the_log_has_the_address(self):
        """That was connected to; in a line of text only with every other step."""
        self.names(lambda *_: ['127.0.0.2', '127.0.0.1'])
        lines, handler = [], logging.Handler()
        handler.emit = lambda record: lines.append(json.loads(socks.JsonFormatter().format(record)))
        socks.log.addHandler(handler)
        self.addCleanup(socks.log.removeHandler, handler)
        self.addCleanup(socks.log.setLevel, socks.log.level)
        socks.log.setLevel(logging.DEBUG)
        server, origin, refused = self.serve(), self.origin(echo), self.refused_port()
        connected = f'127.0.0.1:{origin.port}'
        for host, port, expected in (
                ('a.test', origin.port, connected), ('127.0.0.1', origin.port, connected),
                ('127.1', origin.port, connected), ('a.test', refused, '')):
            del lines[:], self.lines[:]
            self.ask(server, host, port)
            line = eventually(lambda: [line for line in lines if 'outcome' in line])[0]
            with self.subTest(host, port=port):
                self.assertEqual(line['target_address'], expected)
                self.assertEqual(line['target'], f'{host.replace("127.1", "127.0.0.1")}:{port}')
                self.assertEqual(any(f'connected to {connected}' in line for line in self.lines),
                                 bool(expected))

    def test_look_ups_for_others(self):
        """RESOLVE, too, has the first address that it may tell, and BIND asks in the same way."""
        asked = self.names(lambda *_: ['127.0.0.2', '127.0.0.1'])
        server = self.serve(tor_extensions=True, rules=self.rules(
            'deny resolve to 127.0.0.2\nallow to *'))
        for command in 0xF0, 2:
            with Peer(server.server_address) as peer:
                response = peer.request(command, Address('a.test.', 0))
                self.assertEqual((response.reply, response.address.host), (0, '127.0.0.1'))
        self.assertEqual(sorted(asked), [('a.test.', 2), ('a.test.', socket.AF_INET6)])


class RulesTest(FileCase):

    def client(self, host='192.0.2.1', command='CONNECT', user='-'):
        client = socks.Session(None, Address(host, 1))
        client.command, client.user = socks.Command[command], user
        return client

    def test_rules(self):
        rules = socks.Rules(self.rules(RULES))
        for user, host, command, name, address, port, expected in JUDGED:
            client = self.client(host, command, user)
            with self.subTest(user=user, host=host, command=command, name=name, address=address):
                rule = rules.first(client, Address(address, port), name or None)
                if name and rule and rule.allow:
                    rule = rules.first_for_name(client, Address(name, port), False)
                self.assertEqual(bool(rule and rule.allow), expected)

    def test_wrong_rules(self):
        for text, message in WRONG_RULES:
            path = self.write('f', text)
            with self.subTest(text), self.assertRaisesRegex(
                    socks.FileError, re.escape(path[:-1]) + message):
                socks.read_rules(path)

    def test_all_faults_are_found(self):
        path = self.write('f', 'permit to *\nallow to *\nallow\n')
        with self.assertRaises(socks.FileError) as caught:
            socks.read_rules(path)
        self.assertEqual([fault.partition(' ')[0] for fault in caught.exception.args],
                         [f'{path}:1:', f'{path}:3:'])
        self.assertIn("'permit', expected allow or deny (and 1 more, which --check shows)",
                      str(caught.exception))

    def test_quoted_names(self):
        """Users may have spaces in their names, and names that are other words here."""
        rules = self.rules("""deny user 'Bob Smith' "O'Brien X" O'Hara 'to' "" to 'a.example' # 'x
                              deny user 'a #b' to *""")
        self.assertEqual(rules[0].users, ("'Bob Smith'", '"O\'Brien X"', "O'Hara", 'to', "''"))
        self.assertEqual((rules[0].names, rules[1].users), (('a.example',), ("'a #b'",)))
        server = self.serve(users={'Bob Smith': 's', 'Bob': 's', b'\xff': b's'},
                            rules=self.rules("deny user 'Bob Smith' to *\nallow to *"))
        origin = self.origin(echo)
        for name, reply in ((b'Bob Smith', 2), (b'Bob', 0)):
            peer = self.peer(server.server_address)
            peer.ask(Greeting(b'\2'), Choice)
            self.assertEqual(peer.ask(Credentials(name, b's'), Verdict), Verdict(0))
            self.assertEqual(peer.ask(Request(1, Address('127.0.0.1', origin.port)),
                                      Response).reply, reply)

    def test_names_that_are_not_text(self):
        """Bytes in a file of rules are those of a user's name."""
        path = self.write('f', '')
        with open(path, 'wb') as file:
            file.write(b'deny user b\xfcb to *\n')
        client = self.client(user=socks.printable(socks.name_text(b'b\xfcb')))
        rule = socks.Rules(socks.read_rules(path)).first(client, Address('1.2.3.4', 80))
        self.assertFalse(rule.allow)

    def test_what_is_forbidden_is_not_looked_up(self):
        """Nor a name of which no rule speaks."""
        server = self.serve(rules=self.rules('deny to .slow\nallow to x.slow localhost'))
        self.slow_names()
        for name in ('a.slow', 'x.slow', 'y.example'):
            with Peer(server.server_address) as peer:
                self.assertEqual(peer.connect(name, 80).reply, Reply.NOT_ALLOWED)
        eventually(lambda: len(self.lines) == 3)
        self.assertRegex('\n'.join(self.lines), r'refused: .*rules:1 denies a.slow:80')
        self.assertIn('refused: no rule matches y.example:80', '\n'.join(self.lines))

    def test_names_and_addresses(self):
        """A name that is allowed must not lead to an address that is not."""
        origin = self.origin(echo)
        for rules, host, reply in (
                ('allow to localhost', 'localhost', 0), ('allow to localhost', '127.0.0.1', 2),
                ('deny to 127.0.0.0/8 ::1\nallow to *', 'localhost', 2),
                ('allow to 127.0.0.0/8\ndeny to *', 'localhost', 0), ('allow to *', '127.0.0.1', 0),
                ('allow to * 1-2', '127.0.0.1', 2)):
            with self.subTest(rules, host=host):
                server = self.serve(rules=self.rules(rules))
                self.assertEqual(self.peer(server.server_address).connect(host, origin.port).reply,
                                 reply)

    def test_only_a_network_inside_of_a_local_one_opens_what_is_local(self):
        remote = self.client()
        for to, host, allowed in OPENED:
            server = self.serve(rules=self.rules(f'allow to {to}'))
            with self.subTest(to, host=host):
                with contextlib.suppress() if allowed else self.assertRaises(socks.Refused):
                    server.authorize(remote, Address(host, 1))
        with self.assertRaises(socks.Refused):
            server.authorize(remote, Address('0.0.0.0', 80))

    def test_no_rule_opens_the_proxy_itself(self):
        server = self.serve(rules=self.rules('allow to 127.0.0.0/8 ::/0 64:ff9b::7f00:0/104'))
        port = server.server_address.port
        for host in '127.0.0.1', '64:ff9b::7f00:1':
            server.authorize(self.client(), Address(host, 1))
            with self.subTest(host), self.assertRaisesRegex(socks.Refused, 'the proxy itself'):
                server.authorize(self.client(), Address(host, port))

    def test_bind_for_anybody(self):
        """A remote client needs a rule that names the network of all."""
        for text, host, allowed in (
                ('allow bind to 0.0.0.0/0', '0.0.0.0', True), ('allow to *', '0.0.0.0', False),
                ('allow bind to ::/0', '::', True), ('allow bind to ::/0', '0.0.0.0', True),
                ('allow bind to 10.0.0.0/8', '0.0.0.0', False),
                ('deny bind to 0.0.0.0/0\nallow to 0.0.0.0/0', '0.0.0.0', False)):
            server = self.serve(rules=self.rules(text))
            with self.subTest(text, host=host):
                with contextlib.suppress() if allowed else self.assertRaises(socks.Refused):
                    server.authorize(self.client(command='BIND'), Address(host, 0))
                with self.assertRaises(socks.Refused):
                    server.authorize(self.client(), Address(host, 80))
        with self.assertRaises(socks.Refused):
            self.serve().authorize(self.client(command='BIND'), Address('0.0.0.0', 0))

    def test_bind_for_anybody_but_some(self):
        server = self.serve(rules=self.rules('deny to 127.0.0.2\nallow bind to 0.0.0.0/0'))
        client = self.peer(server.server_address)
        address = client.request(2, Address('0.0.0.0', 0)).address
        with Peer(address, ('127.0.0.2', 0)) as denied:
            self.assertEqual(denied.rest(), b'')
        with Peer(address, ('127.0.0.3', 0)):
            self.assertEqual(Response.unpack(client.read).address.host, '127.0.0.3')

    def ways_by(self, rules):
        """Those of the rules that match, up to the first that denies, or has no way."""
        ways = [rule.via for rule in itertools.takewhile(lambda rule: rule.allow, rules)]
        return ways[:ways.index(None) + 1] if None in ways else ways

    def test_whether_anything_may_be_allowed(self):
        for text, allowed in (
                ('deny udp to *\nallow to *', False), ('allow connect to *', False), ('', False),
                ('deny udp to 10.0.0.0/8\nallow udp to *', True), ('allow to .example', True),
                ('allow user bob to *\ndeny to *', False), ('deny to * 53\nallow to *', True)):
            with self.subTest(text):
                self.assertEqual(socks.Rules(self.rules(text)).may_allow(
                    self.client(), socks.Command.UDP_ASSOCIATE), allowed)

    def test_order_of_many(self):
        """Compiled rules judge as rules do one by one."""
        source = random.Random(3)
        pick = source.choice
        lines = []
        for _ in range(400):
            to = pick(('*', '10.%d.0.0/16 .n%d.example' % (pick(range(9)), pick(range(9))),
                       'n%d.example' % pick(range(9)), '10.%d.2.0/24' % pick(range(9))))
            verb, commands = pick(('allow', 'deny')), pick(('', 'connect', 'udp bind'))
            lines.append(' '.join((verb, commands, pick(('', 'user u%d' % pick(range(9)))),
                                   pick(('', 'from 192.0.2.%d/31' % (2 * pick(range(9))))),
                                   'to', to,
                                   pick(('', '%d' % pick(range(9)), '4-8', '0-9999')),
                                   pick(('', 'via direct', 'via inbound'))
                                   if verb == 'allow' and commands != 'udp bind' else '')))
        rules = self.rules('\n'.join(lines))
        for start in range(0, 400, 20):
            part = rules[start:start + 20]
            compiled = socks.Rules(part)
            for _ in range(40):
                client = self.client('192.0.2.%d' % pick(range(18)),
                                     pick(('CONNECT', 'BIND')), 'u%d' % pick(range(9)))
                name = pick((None, 'n%d.example' % pick(range(9)), 'a.n2.example'))
                target = Address('10.%d.%d.1' % (pick(range(9)), pick(range(4))), pick(range(9)))
                hosts = socks.asked_hosts(target.host)
                judged = [rule for rule in map(socks.Rule.compiled, part)
                          if rule.concerns(client, target.port)]
                expected = [rule for rule in judged if rule.is_for_host(hosts, name)]
                self.assertEqual(compiled.first(client, target, name), next(iter(expected), None))
                self.assertEqual(compiled.ways(client, target, name), self.ways_by(expected))
                asked = Address(name or 'n1.example', target.port)
                by_name = [rule.is_for_all_hosts or rule.names.has(asked.host) for rule in judged]
                for is_final in (False, True):
                    expected = [rule for rule, decides in zip(judged, by_name)
                                if decides or rule.allow and rule.networks
                                and (rule.via or not is_final)]
                    self.assertEqual(compiled.first_for_name(client, asked, is_final),
                                     next(iter(expected), None))
                expected = list(itertools.takewhile(lambda pair: pair[1], (
                    (rule, decides) for rule, decides in zip(judged, by_name)
                    if decides or rule.allow and rule.networks)))
                self.assertEqual(compiled.ways_by_name(client, asked, False),
                                 self.ways_by(rule for rule, _ in expected))

    def test_many_rules_cost_little(self):
        """A thousand of any kind; the time is that of one processor, and of the best of three."""
        kinds = {
            'networks': 'deny to 203.0.{}.{}/32', 'names': 'deny to .n{}-{}.example',
            'users': 'allow user u{}-{} to *', 'clients': 'allow from 203.0.{}.{} to *',
            'users and a network': 'allow user u{}-{} to 10.0.0.0/8',
            'networks and a user': 'allow user bob to 203.0.{}.{}', 'ports': 'deny to * 1{}{}'}
        for kind, text in kinds.items():
            rules = socks.Rules(self.rules('\n'.join(
                text.format(number // 200, number % 200) for number in range(1000))))
            clients = [self.client(user='x')] * 500
            targets = [Address(f'10.1.{n >> 8}.{n & 255}', 443) for n in range(500)]
            names = [Address(f'host{n}.example.org', 443) for n in range(500)]
            rules.first(clients[0], targets[0], 'a')            # now they are compiled
            seconds = []
            for _ in range(3):
                start = time.thread_time() if hasattr(time, 'thread_time') else time.process_time()
                for client, target, name in zip(clients, targets, names):
                    rules.first_for_name(client, name, False)
                    rules.first(client, target, name.host)
                seconds.append((time.thread_time() if hasattr(time, 'thread_time')
                                else time.process_time()) - start)
            with self.subTest(kind):
                self.assertLess(min(seconds) / 500, 50e-6)

    def test_lookups(self):
        """Those for Tor's programs are judged as well."""
        for text, command, host, reply in (
                ('deny resolve to 127.0.0.0/8\nallow to *', 0xF1, '127.0.0.1', 2),
                ('deny to 127.0.0.0/8 ::1\nallow to *', 0xF0, 'localhost', 2),
                ('deny to localhost\nallow to *', 0xF0, 'localhost', 2),
                ('allow resolve to *', 0xF0, 'localhost', 0), ('allow to *', 0xF1, '127.0.0.1', 0)):
            server = self.serve(rules=self.rules(text), tor_extensions=True)
            with self.subTest(text, host=host), Peer(server.server_address) as peer:
                peer.ask(Greeting(b'\0'), Choice)
                request = Request(command, Address(host, 0))
                self.assertEqual(peer.ask(request, Response).reply, reply)

    @needs_ipv6
    def test_a_socket_for_both_families(self):
        """An IPv4 client on it is an IPv4 client."""
        sock = socket.socket(socket.AF_INET6)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(('::ffff:127.0.0.1', 0))
        sock.listen(5)
        settings = Settings(rules=self.rules('deny from 127.0.0.2 to *\nallow to 127.0.0.0/8'))
        server = self.enter(socks.Server((), settings, listeners=[sock]).start())
        origin, address = self.origin(echo), ('127.0.0.1', sock.getsockname()[1])
        for source, reply in (('127.0.0.1', 0), ('127.0.0.2', 2)):
            with Peer(address, (source, 0)) as peer:
                self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, reply)
        client = self.peer(address)
        eventually(lambda: client.sock.getsockname() in [each.address for each in server.clients])
        listener = client.request(2, Address('127.0.0.1', 0)).address
        with Peer(listener) as target:
            self.assertEqual((listener.host, Response.unpack(client.read).address),
                             ('127.0.0.1', target.sock.getsockname()))
        target = self.enter(Echo())
        with socks.socksocket(type=socket.SOCK_DGRAM, proxy='socks5://%s:%d' % address) as sock:
            sock.settimeout(PATIENCE)
            sock.sendto(b'x', target.address)
            self.assertEqual(sock.recv(10), b'E:x')

    def test_datagrams_and_reload(self):
        """Each is judged, and judged anew after the rules have changed."""
        server = self.serve(rules=self.rules('allow udp to 127.0.0.0/8'))
        target = self.enter(Echo())
        client = self.enter(Associate(server))
        datagram = Datagram(target.address, b'x').pack()
        self.assertEqual(Datagram.unpack(client.ask(datagram)).payload, b'E:x')
        relay = self.relay_in(server)
        server.reconfigure(server.settings._replace(rules=self.rules('deny to *')))
        eventually(lambda: not relay.routes.known)
        client.send(datagram)
        self.assertTrue(client.nothing_comes())
        server.reconfigure(server.settings._replace(rules=self.rules('allow to localhost')))
        eventually(lambda: not relay.routes._failed)
        client.send(datagram)
        self.assertTrue(client.nothing_comes())
        named = Datagram(Address('localhost', target.address.port), b'y').pack()
        self.assertEqual(Datagram.unpack(client.ask(named)).payload, b'E:y')


class Exit(socks.Handler):
    """A proxy that notes what it is asked for and connects to a fixed port of this host."""

    def do_CONNECT(self, request):
        self.server.asked.append(request.address.host)
        if request.address.host.startswith('refuse.'):
            raise socks.Refused('no', reply=Reply.HOST_UNREACHABLE)
        return socket.create_connection(('127.0.0.1', self.server.target))


class WaysTest(FileCase):
    """Rules that choose the way of a connection."""

    def setUp(self):
        super().setUp()
        self.target = self.origin()

    def exit(self):
        server = self.enter(socks.Server(('127.0.0.1', 0), handler_class=Exit).start())
        server.asked, server.target = [], self.target.port
        return server

    def ways(self, *lines, **settings):
        """A server with these rules."""
        return self.serve(rules=socks.read_rules(self.write('rules', '\n'.join(lines) + '\n')),
                          **settings)

    def source(self, server, host, port=None, code=0):
        """Where the target sees the connection come from."""
        with Peer(server.server_address) as peer:
            self.assertEqual(peer.connect(host, port or self.target.port).reply, code)
            if not code:
                with self.target.take() as far:
                    return far.sock.getpeername()[0]

    def test_proxies_for_some_names(self):
        one, other = self.exit(), self.exit()
        self.names(lambda name, family: ['127.0.0.1'])
        server = self.ways(
            f'allow to .onion via socks5h://{one.server_address}',
            f'allow to .here.test via socks5://{other.server_address}',
            f'allow to .chain.test via socks5h://{one.server_address} '
            f'socks5h://{other.server_address}',
            'allow to direct.test via direct', 'allow to *',
            upstream=(socks.parse_proxy_url(f'socks4a://{other.server_address}'),))
        for host, asked in (('a.onion', (['a.onion'], [])), ('a.here.test', ([], ['127.0.0.1'])),
                            ('A.CHAIN.test.', ([other.server_address.host], [])),
                            ('direct.test', ([], [])), ('127.0.0.1', ([], ['127.0.0.1'])),
                            ('rest.test', ([], ['rest.test']))):
            with self.subTest(host):
                if 'CHAIN' not in host:         # the first proxy leads somewhere else here
                    self.source(server, host)
                    self.assertEqual((one.asked, other.asked), asked)
                del one.asked[:], other.asked[:]

    def test_addresses_decide(self):
        """For a name that no rule is on, as soon as it is looked up."""
        proxy = self.exit()
        self.names(lambda name, family: ['127.0.0.2', '127.0.0.1'] if name == 'two.test'
                   else ['127.0.0.1'])
        server = self.ways(f'allow to 127.0.0.2 via socks5h://{proxy.server_address}',
                           'allow to 127.0.0.0/8')
        self.source(server, 'two.test')
        self.assertEqual(proxy.asked, ['127.0.0.2'])
        self.source(server, 'one.test')
        self.assertEqual(proxy.asked, ['127.0.0.2'])

    def test_rules_on_other_names(self):
        """They decide nothing about a name, which is left to the proxy of the rule on all."""
        proxy, looked_up = self.exit(), []
        self.names(lambda name, family: looked_up.append(name) or ['127.0.0.1'])
        server = self.ways(*(f'allow to other.test {port} via socks5h://127.0.0.1:9'
                             for port in (self.target.port, 9)),        # found by its port
                           f'allow to * via socks5h://{proxy.server_address}')
        self.source(server, 'a.test')
        self.assertEqual((proxy.asked, looked_up), (['a.test'], []))

    def test_networks_with_a_way_past_the_usual_proxy(self):
        """A name is looked up here for a rule on networks that has a way of its own, although the
        usual proxy looks names up; not for other rules on networks."""
        proxy, looked_up = self.exit(), []
        self.names(lambda name, family: looked_up.append(name) or ['127.0.0.1'])
        usual = socks.parse_proxy_url(f'socks5h://{proxy.server_address}')
        for way, code, expected in ((' via direct', 0, True),
                                    ('', Reply.NOT_ALLOWED, False)):
            with self.subTest(way):
                server = self.ways(f'allow to 127.0.0.0/8{way}', 'deny to *', upstream=(usual,))
                self.source(server, 'a.test', code=code)
                self.assertEqual((proxy.asked, bool(looked_up)), ([], expected))
                looked_up.clear()

    @unittest.skipUnless(sys.platform == 'linux', '127.0.0.5 is only here')
    def test_local_addresses(self):
        server = self.enter(socks.Server([('127.0.0.3', 0)], Settings(
            users={'bob': 'secret', 'eve': 'secret'}, source=('127.0.0.4',),
            rules=('allow user bob to * via 127.0.0.5', 'allow user eve to 127.0.0.1 via inbound',
                   'allow to 127.0.0.1 via direct'), trusted='127.0.0.9')).start())
        for user, source, expected in ((b'bob', '127.0.0.1', '127.0.0.5'),
                                       (b'eve', '127.0.0.1', '127.0.0.3'),
                                       (None, '127.0.0.9', '127.0.0.4')):
            with self.subTest(user), Peer(server.server_address, (source, 0)) as peer:
                peer.ask(Greeting(b'\2' if user else b'\0'), Choice)
                if user:
                    peer.ask(Credentials(user, b'secret'), Verdict)
                request = Request(1, Address('127.0.0.1', self.target.port))
                self.assertEqual(peer.ask(request, Response).reply, 0)
                far = self.target.take()
                self.assertEqual(far.sock.getpeername()[0], expected)

    def test_the_next_way(self):
        """It is tried if one cannot be reached, not if that refuses."""
        proxy, dead = self.exit(), f'127.0.0.1:{self.refused_port()}'
        server = self.ways(
            f'allow to a.test via socks5h://{dead}', 'deny to 192.0.2.0/24',
            f'allow to .test via http://{dead}',
            f'allow to .test via socks5h://{proxy.server_address}', 'allow to *')
        self.source(server, 'a.test')
        self.assertEqual(proxy.asked, ['a.test'])
        self.source(server, 'refuse.test', code=Reply.HOST_UNREACHABLE)
        self.assertEqual(proxy.asked, ['a.test', 'refuse.test'])
        server = self.ways('allow to 127.0.0.1 via 192.0.2.77', 'allow to 127.0.0.1 via direct')
        self.source(server, '127.0.0.1')
        self.names(lambda name, family: ['127.0.0.1'])
        server = self.ways('allow to c.test via 192.0.2.77',
                           f'allow to c.test via socks5h://{proxy.server_address}')
        self.source(server, 'c.test')
        self.assertEqual(proxy.asked[2:], ['c.test'])
        server = self.ways(f'allow to a.test via socks5h://{dead}', 'deny to *')
        self.source(server, 'a.test', code=Reply.GENERAL_FAILURE)
        self.source(server, 'b.test', code=Reply.NOT_ALLOWED)

    def test_name_without_an_address(self):
        """No rule on networks can match it, so those on names decide; not if that may change."""
        def names(name, family):
            if name == 'later.test':
                raise socket.gaierror(socket.EAI_AGAIN, 'try again')
            raise socket.gaierror(socket.EAI_NONAME, 'no such name')

        proxy = self.exit()
        self.names(names)
        lines = ('allow to 192.0.2.0/24',
                 f'allow to .onion a.test later.test via socks5h://{proxy.server_address}')
        for rules in lines, (f'{lines[0]} via direct', lines[1]), lines[::-1]:
            server = self.ways(*rules, 'allow to *')
            for host in 'abc.onion', 'a.test':
                self.source(server, host)
                self.assertEqual(proxy.asked.pop(), host)
            self.source(server, 'b.test', code=Reply.HOST_UNREACHABLE)
            if rules != lines[::-1]:
                self.source(server, 'later.test', code=Reply.GENERAL_FAILURE)
            self.assertEqual(proxy.asked, [])

    def test_names_for_the_usual_proxy(self):
        """A way for some names does not have others looked up here."""
        proxy, looked_up = self.exit(), []
        self.names(lambda name, family: looked_up.append(name) or ['127.0.0.1'])
        server = self.ways('allow to 10.0.0.0/8', 'allow to *', 'allow to x.test via direct',
                           upstream=(socks.parse_proxy_url(f'socks5h://{proxy.server_address}'),))
        self.source(server, 'secret.test')
        self.assertEqual((proxy.asked, looked_up), (['secret.test'], []))

    def test_only_connections_and_datagrams_have_ways(self):
        """What else the rule would allow must not leave in another way."""
        server = self.ways('allow to 127.0.0.1 via socks5h://127.0.0.1:9', tor_extensions=True)
        for command in (socks.Command.BIND, socks.Command.RESOLVE):
            with Peer(server.server_address) as peer:
                reply = peer.request(command, Address('127.0.0.1', 0)).reply
                self.assertEqual(reply, Reply.NOT_ALLOWED)

    def test_wrong_ways(self):
        for text, message in (
                ('deny to * via direct', 'after what is allowed'),
                ('allow bind to * via direct', 'for connections and UDP, expected no command'),
                ('allow udp to * via socks5h://a http://b:1', 'UDP through HTTP proxy b:1, expect'),
                ('allow connect udp to * via socks4a://a', 'UDP through SOCKS4 proxy a:1080, exp'),
                ('allow via direct to *', "'via' is not expected here"),
                ('allow to via direct', "'via' is not expected here"),
                ('allow to * via', 'expected direct'),
                ('allow to * via nowhere', 'expected direct'),
                ('allow to * via socks5h://bob:secret@h nowhere', '^here: via: expected direct'),
                ('allow to * via direct inbound', 'expected direct'),
                ('allow to * via 127.0.0.1 127.0.0.2', 'of each family'),
                ('allow to * via socks5h://a 127.0.0.1', 'expected direct'),
                ('allow to * via ftp://a', "scheme 'ftp'"),
                ('allow to * via direct to *', "'to' is not expected here")):
            with self.subTest(text), self.assertRaisesRegex(socks.FileError, message):
                socks.parse_rule(text, 'here')

    @needs_ipv6
    def test_version_of_ip(self):
        six = self.origin(host='::1', port=self.target.port)
        self.names(lambda name, family: ['::1', '127.0.0.1'])
        for settings, target in (({'family': 4}, self.target), ({'family': 6}, six),
                                 ({'prefer': 4}, self.target), ({'prefer': 6}, six)):
            with self.subTest(settings), Peer(self.serve(**settings).server_address) as peer:
                self.assertEqual(peer.connect('both.test', self.target.port).reply, 0)
                target.take()
        for version, host in ((4, '::1'), (6, '127.0.0.1')):
            with Peer(self.serve(family=version).server_address) as peer:
                self.assertEqual(peer.connect(host, self.target.port).reply,
                                 Reply.NETWORK_UNREACHABLE)
        with self.assertRaisesRegex(ValueError, 'Settings.prefer: 5: expected 4, 6 or 0'):
            self.serve(prefer=5)


class AccessTest(FileCase):

    def log_in(self, server, name, password):
        """Whether it is accepted."""
        with Peer(server.server_address) as peer:
            self.assertEqual(peer.ask(Greeting(b'\2'), Choice), Choice(2))
            return peer.ask(Credentials(name, password), Verdict).status == 0

    def test_users_file(self):
        hashed = [socks.Hashed.make(b'secret'), hashed_text(b'secret', b'salt', 1000)]
        path = self.write('users', '# ours\nann:pass:word\n\nbob:%s\ncarl:%s\n' % tuple(hashed))
        users = socks.read_users(path)
        server = self.serve(users=users)
        for name, password, right in ((b'ann', b'pass:word', True), (b'bob', b'secret', True),
                                      (b'carl', b'secret', True), (b'bob', b'secre', False),
                                      (b'carl', b'', False), (b'dan', b'secret', False),
                                      (b'bob', hashed[0].encode()[:255], False)):
            with self.subTest(name, password=password):
                self.assertEqual(self.log_in(server, name, password), right)
        self.assertTrue(users[b'bob'].is_known(b'secret'))
        self.assertFalse(users[b'bob'].is_known(b'secre'))

    def test_wrong_users_files(self):
        for text in ('bob', 'bob:', ':x', 'bob:scrypt:1000-8-1:00:' + '00' * 32,
                     'bob:pbkdf2:0:00:' + '00' * 32, 'bob:pbkdf2:1:00:00',
                     'bob:a\nbob:b', 'b' * 256 + ':x', 'bob:scrypt:1:2', 'bob:x\nbob\neve',
                     'bob:scrypt:1-2:00:00', 'bob:pbkdf2:x:00:00', 'bob:pbkdf2:1:0:00',
                     'bob:pbkdf2:9000000000:00:' + '00' * 32,       # as costly, or refused later
                     'bob:scrypt:1048576-1-1:00:' + '00' * 32,
                     'bob:scrypt:2-16384-64:00:' + '00' * 32):
            path = self.write('users', 'ann:x\n' + text)
            with self.subTest(text), self.assertRaisesRegex(socks.FileError, r'users:[23]: expect'):
                socks.read_users(path)
        with self.assertRaises(socks.FileError) as caught:
            socks.read_users(self.write('users', 'bob\nann:x\nann:y\n'))
        self.assertEqual([fault.partition(': ')[0][-7:] for fault in caught.exception.args],
                         ['users:1', 'users:3'])
        path = self.write('users', '# none\n')
        with self.assertRaisesRegex(socks.FileError, f'^--users {path}: expected at least one NAM'):
            socks.read_users(path)
        with self.assertRaisesRegex(ValueError, 'expected METHOD:PARAMETERS:SALT:HASH, as --hash'):
            socks.Hashed('secret')
        path = self.write('users', 'bob:x\n')
        os.chmod(path, 0o644)
        with self.assertLogs('socks', 'WARNING') as logged:
            socks.read_users(path)
        self.assertIn('other users can read this file', logged.output[0])
        os.chmod(path, 0o440)
        if not os.geteuid():            # a credential of systemd is another user's
            os.chown(path, 65534, 65534)
            with self.assertLogs('socks', 'WARNING') as logged:
                socks.log.warning('the only one')
                socks.read_users(path)
            self.assertEqual(len(logged.output), 1)
            os.chown(path, 0, 0)
        os.chmod(path, 0o600)
        self.write('users', '\ufeffbob:x\n')           # as Windows' Notepad begins it
        self.assertEqual(socks.read_users(path), {b'bob': b'x'})

    def test_many_guesses_at_once(self):
        """Most are not even verified, and few are at a time."""
        self.change(socks.Failures, LIMIT=15)
        # As costly as real ones, for the loop counts a failure after its verification.
        server = self.serve(users={'bob': socks.Hashed('pbkdf2:100000:00:' + '00' * 32)})
        running, most, verify = [], [], socks.Hashed.verify

        def counted(hashed, password):
            running.append(1)
            most.append(len(running))
            try:
                return verify(hashed, password)
            finally:
                running.pop()

        self.change(socks.Hashed, verify=counted)
        limit = socks.Failures.LIMIT
        guesses = [Background(self.log_in, server, b'bob', b'x') for _ in range(2 * limit)]
        self.assertFalse(any(guess.result() for guess in guesses))
        self.assertLess(len(most), 1.5 * limit)
        self.assertLessEqual(max(most), 2)

    def test_many_right_ones_at_once(self):
        """As many as were too many if they were wrong."""
        verify = socks.Hashed.verify

        def slow(hashed, password):
            time.sleep(0.3)
            return verify(hashed, password)

        self.change(socks.Hashed, verify=slow)
        server = self.serve(users={'bob': socks.Hashed(hashed_text(b's'))})
        logins = [Background(self.log_in, server, b'bob', b's')
                  for _ in range(2 * socks.Failures.LIMIT)]
        self.assertTrue(all(login.result() for login in logins))

    def test_failures_are_slow_and_limited(self):
        server = self.serve(users={'bob': 'secret'}, login_delay=0.1)
        started = time.monotonic()
        self.assertFalse(self.log_in(server, b'bob', b'x'))
        self.assertGreaterEqual(time.monotonic() - started, server.settings.login_delay)
        for _ in range(socks.Failures.LIMIT):
            server.failures.note('127.0.0.1', b'bob')
        self.assertFalse(self.log_in(server, b'bob', b'secret'))
        server.failures.WINDOW = 0
        self.assertTrue(self.log_in(server, b'bob', b'secret'))
        for number in range(socks.Failures.ROOM):           # it does not grow without end
            server.failures.note(f'10.0.{number >> 8}.{number & 255}', b'bob')
        self.assertEqual(len(server.failures._since), socks.Failures.ROOM)

    def test_failures_of_one_user_do_not_lock_out_others(self):
        """One warning tells of each that is locked out, even where only warnings are logged."""
        server = self.serve(users={'bob': 'secret', 'ann': 's', 'b c': 's'})
        for name in b'bob', b'b c':
            guesses = [Background(self.log_in, server, name, b'x')
                       for _ in range(socks.Failures.LIMIT)]
            self.assertFalse(any(guess.result() for guess in guesses))
        self.assertFalse(self.log_in(server, b'bob', b'secret'))
        self.assertTrue(self.log_in(server, b'ann', b's'))
        number = socks.Failures.CLIENT_LIMIT // 2
        for _ in range(2):
            for each in range(number):
                server.failures.note('127.0.0.1', b'%d' % each)
        self.assertFalse(self.log_in(server, b'ann', b's'))
        self.assertEqual([line for line in self.lines if 'blocked' in line], [
            f'127.0.0.1: blocked for 60 s after 30 wrong passwords of {user}'
            for user in ('bob', "'b c'")])

    def test_many_names_are_locked_out_at_last(self):
        server = self.serve(users={'bob': 'secret'})
        for number in range(socks.Failures.CLIENT_LIMIT - 1):
            self.assertEqual(server.failures.note('127.0.0.1', b'%d' % number), [])
        self.assertFalse(self.log_in(server, b'ann', b'x'))
        self.assertFalse(self.log_in(server, b'bob', b'secret'))
        self.assertEqual([line for line in self.lines if 'blocked' in line],
                         ['127.0.0.1: blocked for 60 s after 300 wrong passwords'])

    def test_a_failure_does_not_tell_who_has_a_hashed_password(self):
        """Where one has, all failures wait for the sums."""
        users = socks.Users({'ann': 's', 'bob': socks.Hashed('pbkdf2:1::' + '00' * 32)})
        for name in b'ann', b'bob', b'eve':
            conversation = users.verify(Credentials(name, b'x'))
            with self.subTest(name):
                self.assertIs(next(conversation).worker, socks.Worker.COSTLY)
                conversation.close()
        with self.assertRaises(StopIteration) as caught:
            next(users.verify(Credentials(b'ann', b's')))
        self.assertIs(caught.exception.value, True)

    def test_credentials_are_judged_by_the_settings_of_now(self):
        """Of clients that came before these changed, up to their request."""
        old = Settings(users={'bob': 'old', 'ann': 's'}, login_delay=0.02)
        new = old._replace(users={'bob': 'new', 'ann': 's'})
        origin = self.origin(echo)
        bob, ann = Credentials(b'bob', b'old'), Credentials(b'ann', b's')
        elsewhere = self.networks('192.0.2.0/24')
        trust, foreign = self.networks('127.0.0.1/32'), Settings(clients=elsewhere)
        for before, settings, steps, after, expected in (
                (old, new, [], [bob], 1), (old, new, [], [Credentials(b'bob', b'new')], 0),
                (old, new, [bob], [], 2), (old, new, [ann], [], 0), (old, new, [], [ann], 0),
                (old, old._replace(users={'ann': 's'}), [], [bob], 1),
                (Settings(), old, [None], [], 2), (old, Settings(), [], [bob], 0),
                (old._replace(trusted=trust), old, [None], [], 2), (Settings(), foreign, [], [], 2),
                (old, old._replace(trusted=trust), [], [Credentials(b'x', b'x')], 0)):
            server = self.serve(**before._asdict())
            peer = self.peer(server.server_address)
            plain = None in steps or not before.users
            self.assertEqual(peer.ask(Greeting(b'\0' if plain else b'\2'), Choice),
                             Choice(0 if plain else 2))
            with self.subTest(before=before, settings=settings, after=after):
                for step in filter(None, steps):
                    self.assertEqual(peer.ask(step, Verdict), Verdict(0))
                server.reconfigure(settings)
                status = [peer.ask(step, Verdict).status for step in after]
                if expected == 1:
                    self.assertNotEqual(status, [0])
                else:
                    self.assertEqual(status, [0] * len(after))
                    self.assertEqual(peer.ask(Request(1, Address('127.0.0.1', origin.port)),
                                              Response).reply, expected)

    def test_no_open_proxy_after_a_change(self):
        with socks.Server(('0.0.0.0', 0), Settings(users=USERS)) as server:
            with self.assertRaisesRegex(ValueError, 'everybody'):
                server.reconfigure(Settings())
            self.assertEqual(len(server.settings.users), len(USERS))
            server.reconfigure(Settings(users=USERS, max_clients=7, max_handshakes=5))
            self.assertEqual((server.max_clients, server.max_handshakes), (7, 5))

    def networks(self, *texts):
        return tuple(map(socks.parse_network, texts))

    def test_a_small_server_is_not_filled_by_one_host(self):
        """Of few clients, too, some place is left."""
        for number, share in ((2, 2), (50, 37), (100, 64), (1000, 500)):
            with socks.Server(('127.0.0.1', 0), Settings(max_clients=number)) as server:
                self.assertEqual((server.max_handshakes, server.max_per_client), (share, share))

    def test_many_networks(self):
        """Five thousand are compiled once, and looked up as quickly as one."""
        networks = [socks.parse_network(f'10.{number >> 8}.{number & 255}.0/24')
                    for number in range(5000)] + [socks.parse_network('2001:db8::/32')]
        with socks.Server(('127.0.0.1', 0), Settings(clients=networks)) as server:
            start, clients = time.process_time(), server.settings.clients
            for number in range(5000):
                self.assertTrue(clients.has(f'10.{number >> 8}.{number & 255}.7'))
                self.assertFalse(clients.has(f'11.{number >> 8}.{number & 255}.7'))
            self.assertLess(time.process_time() - start, 1)
            self.assertTrue(clients.has('2001:db8::1'))
            self.assertFalse(clients.has('2001:db9::1'))

    def test_networks(self):
        server = self.serve(clients=self.networks('127.0.0.2/32'))
        with Peer(server.server_address) as peer:
            self.assertEqual(peer.rest(), b'')
        peer = self.peer(server.server_address, ('127.0.0.2', 0))
        self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))
        self.assertIn('refused: the client is in none of the networks to serve', self.line())

    def test_trusted_networks(self):
        server = self.serve(users={'bob': 's'}, trusted=self.networks('127.0.0.2/32'))
        for source, choice in (('127.0.0.2', 0), ('127.0.0.1', 255)):
            with Peer(server.server_address, (source, 0)) as peer:
                self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(choice))
        with Peer(server.server_address, ('127.0.0.2', 0)) as peer:     # it may send one
            peer.ask(Greeting(b'\2'), Choice)
            self.assertEqual(peer.ask(Credentials(b'x', b'y'), Verdict), Verdict(0))

    def test_connections_of_one_client(self):
        server = self.serve(max_per_client=2)
        first, second = (self.peer(server.server_address) for _ in range(2))
        second.ask(Greeting(b'\0'), Choice)
        with Peer(server.server_address) as third, Peer(
                server.server_address, ('127.0.0.2', 0)) as other:
            self.assertEqual(third.rest(), b'')
            self.assertEqual(other.ask(Greeting(b'\0'), Choice), Choice(0))
        first.sock.close()
        eventually(lambda: server.sessions.connections['127.0.0.1'] == 1)
        self.assertEqual(self.peer(server.server_address).ask(Greeting(b'\0'), Choice), Choice(0))

    def balanced(self, server, host):
        """A client that a load balancer announces."""
        peer = self.peer(server.server_address)
        target = '::1' if ':' in host else '127.0.0.1'
        peer.send(socks.ProxyHeader(Address(host, 5), Address(target, 1080)).pack())
        return peer

    def test_one_client_is_a_network_of_ipv6(self):
        """In the number of connections and of failures, and in its share of look-ups."""
        server = self.serve(balancers=self.networks('127.0.0.0/8'), max_per_client=2,
                            users={'bob': 's'})
        clients = []
        for host in '2001:db8::1', '2001:db8::2', '2001:db8:0:1::1':
            clients.append(self.balanced(server, host))
            self.assertEqual(clients[-1].ask(Greeting(b'\2'), Choice), Choice(2))
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(self.balanced(server, '2001:db8::3').rest(), b'')
        self.assertEqual(clients[0].ask(Credentials(b'bob', b'x'), Verdict), Verdict(1))
        key = socks.client_key('2001:db8::ffff')
        self.assertEqual(server.failures._since[key, b'bob'][1], 1)
        self.slow_names()
        self.assertEqual(clients[1].ask(Credentials(b'bob', b's'), Verdict), Verdict(0))
        clients[1].send(Request(1, Address('a.slow', 1)).pack())
        eventually(lambda: key in server._pool._shares)

    def test_connections_of_one_client_by_default(self):
        """One from another host takes half of what there is; any from this host."""
        server = self.serve(balancers=self.networks('127.0.0.1/32'), max_clients=128,
                            max_handshakes=1000)
        for host, limit in (('192.0.2.1', True), ('127.0.0.1', False)):
            peers = []
            for _ in range(65):
                peers.append(self.balanced(server, host))
                peers[-1].send(Greeting(b'\0').pack())
            with self.subTest(host):
                for peer in peers[:64]:
                    self.assertEqual(peer.read(2), b'\5\0')
                if limit:
                    self.check_end(peers[64], may_reset=True)
                else:
                    self.assertEqual(peers[64].read(2), b'\5\0')
            for peer in peers:
                peer.sock.close()
            eventually(lambda: not server.clients)
        self.assertEqual(server.sessions.connections, {})

    def test_handshakes_make_room(self):
        server, origin = self.serve(max_handshakes=2), self.origin()
        near, far = self.tunnel(server, origin)         # is none any more
        silent = [self.peer(server.server_address) for _ in range(2)]
        eventually(lambda: server.sessions.negotiating == 2)
        self.assertEqual(self.peer(server.server_address).ask(Greeting(b'\0'), Choice), Choice(0))
        self.assertEqual(silent[0].rest(), b'')
        near.send(b'x')
        self.assertEqual(far.read(1), b'x')

    def test_who_has_most_handshakes_makes_room(self):
        """However many an address begins, those of a hundred others go on."""
        server = self.serve(max_handshakes=110)
        others = [self.peer(server.server_address, (f'127.0.1.{number}', 0))
                  for number in range(1, 101)]
        eventually(lambda: server.sessions.negotiating == 100)
        flood = [self.peer(server.server_address, ('127.0.0.2', 0)) for _ in range(50)]
        for peer in flood[:40]:
            self.assertEqual(peer.rest(), b'')
        for peer in others + flood[40:]:
            self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))
            peer.sock.close()
        eventually(lambda: not server.clients)
        self.assertEqual((server.sessions.negotiating, server.sessions._tasks), (0, {}))

    def test_handshakes_by_way_of_a_balancer(self):
        """They count for the client that it announces."""
        server = self.serve(max_handshakes=3, balancers=self.networks('127.0.0.0/8'))
        one = self.balanced(server, '192.0.2.1')
        self.assertEqual(one.ask(Greeting(b'\0'), Choice), Choice(0))
        flood = [self.balanced(server, '192.0.2.2') for _ in range(2)]
        for peer in flood:
            self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))
        last = self.balanced(server, '192.0.2.3')
        self.assertEqual(last.ask(Greeting(b'\0'), Choice), Choice(0))
        self.assertEqual(flood[0].rest(), b'')
        one.send(Request(9, Address('127.0.0.1', 1)).pack())
        self.assertEqual(Response.unpack(one.read).reply, Reply.COMMAND_NOT_SUPPORTED)

    def test_ident(self):
        """5A, 5C and 5D by what the client's host says."""
        server = self.serve(ident=True)
        origin = self.origin(echo)
        self.addCleanup(setattr, socks, 'IDENT_PORT', socks.IDENT_PORT)
        request = Request4(1, Address('127.0.0.1', origin.port), b'bob')
        for answer, code in ((' {} : USERID : UNIX : bob', 0x5a),
                             ('{}:USERID:UNIX,UTF-8:bob', 0x5a), ('{}:USERID:UNIX:eve', 0x5d),
                             ('{}:USERID:OTHER:bob', 0x5c), ('{}:ERROR:NO-USER', 0x5c),
                             ('garbage', 0x5c), ('x' * 2000, 0x5c), (None, 0x5c)):
            def tell(peer):
                with peer.sock.makefile('rb') as file:
                    query = file.readline().decode().strip()
                queries.append(query)
                if answer:
                    peer.send(answer.format(query).encode() + b'\r\n')

            with self.subTest(answer), Origin(tell) as ident, \
                    Peer(server.server_address) as peer:
                queries = []
                socks.IDENT_PORT = ident.port
                self.assertEqual(peer.ask(request, Response4).code, code)
                self.assertEqual(queries, ['%d , %d' % (peer.sock.getsockname()[1],
                                                        server.server_address.port)])
        socks.IDENT_PORT = self.refused_port()
        self.assertEqual(self.peer(server.server_address).ask(request, Response4).code, 0x5c)
        eventually(lambda: any('SOCKS4 CONNECT' in line and ' bob ' in line for line in self.lines))


PROXY2 = '0d0a0d0a000d0a515549540a'
PROXY_VECTORS = [
    ('X-01', b'PROXY TCP4 127.0.0.1 127.0.0.1 48604 13501\r\n'.hex() + '050100', '0500', False),
    ('X-02', PROXY2 + '2111000c7f0000017f000001e81834be050100', '0500', False),
    ('X-03', PROXY2 + '21210024' + '00' * 15 + '01' + '00' * 15 + '01dcf634be050100', '0500',
     False),
    ('X-04', PROXY2 + '20000000', '', False),
    ('LOCAL, then SOCKS', PROXY2 + '20000000 050100', '0500', False),
    ('unknown family, more than there must be', PROXY2 + '21000003 aabbcc 050100', '0500', False),
    ('TLVs', PROXY2 + '21110010 7f0000017f000001e81834be 04000101 050100', '0500', False),
    ('UNKNOWN', b'PROXY UNKNOWN whatever\r\n'.hex() + '050100', '0500', False),
    ('X-05', '050100', '', True),
    ('another version', PROXY2 + '3111000c7f0000017f000001e81834be050100', '', True),
    ('too short', PROXY2 + '21110008 7f0000017f000001 050100', '', True),
    ('endless line', b'PROXY TCP4 '.hex() + '31*200', '', True),
    ('half a line', b'PROXY TCP4 127.0.0.1\r\n'.hex(), '', True),
    ('nothing behind it', b'PROXY\r\n'.hex(), '', True),
    ('only a family', b'PROXY TCP4\r\n'.hex(), '', True),
    ('too much', b'PROXY TCP4 127.0.0.1 127.0.0.1 1 2 3\r\n'.hex(), '', True),
    ('a zone', b'PROXY TCP6 fe80::1%lo ::1 1 2\r\n'.hex(), '', True),
    ('wrong address', b'PROXY TCP4 127.0.0.1 x 1 2\r\n'.hex(), '', True),
    ('wrong port', b'PROXY TCP4 127.0.0.1 127.0.0.1 x 2\r\n'.hex(), '', True),
    ('too large a port', b'PROXY TCP4 127.0.0.1 127.0.0.1 99999 2\r\n'.hex(), '', True),
    ('wrong family', b'PROXY TCP6 127.0.0.1 127.0.0.1 1 2\r\n'.hex(), '', True),
]


class BalancerTest(VectorCase):
    NETWORKS = tuple(map(socks.parse_network, ('127.0.0.0/8',)))

    def test_vectors(self):
        self.check(PROXY_VECTORS, self.serve(balancers=self.NETWORKS))

    def test_announced_client(self):
        """It is the one of rules, log and trusted networks."""
        server = self.serve(balancers=self.NETWORKS, users={'bob': 's'},
                            trusted=tuple(map(socks.parse_network, ('192.0.2.0/24',))))
        for host, choice in (('192.0.2.7', 0), ('198.51.100.7', 255)):
            with Peer(server.server_address) as peer:
                header = socks.ProxyHeader(Address(host, 5), Address('127.0.0.1', 1080))
                peer.send(header.pack())
                self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(choice))
                if not choice:          # and from elsewhere, it may not reach what is local
                    self.assertEqual(peer.ask(Request(1, Address('127.0.0.1', 1)),
                                              Response).reply, Reply.NOT_ALLOWED)
        eventually(lambda: len(self.lines) == 2)
        self.assertIn('192.0.2.7:5 - SOCKS5 CONNECT', ''.join(self.lines))

    def test_a_loopback_address_that_another_host_announces(self):
        """It is that host's, and no client of this one."""
        server = self.serve(balancers=tuple(map(socks.parse_network, ('0.0.0.0/0',))))
        header = socks.ProxyHeader(Address('127.0.0.1', 5), Address('127.0.0.1', 1080))
        for peer, local in (('192.0.2.1', False), ('127.0.0.2', True)):
            client = socks.Session(server, Address(peer, 7))
            client.command = socks.Command.CONNECT
            near, far = socket.socketpair()
            with near, far:
                handler = socks.Handler(near, (peer, 7), server)
                handler.client = client
                handler.take_addresses(header)
            self.assertEqual(client.address, header.source if local else Address(peer, 7))
            with self.subTest(peer):
                with contextlib.suppress() if local else self.assertRaises(socks.Refused):
                    server.authorize(client, Address('127.0.0.1', 1))

    def test_others_need_no_header(self):
        server = self.serve(balancers=tuple(map(socks.parse_network, ('192.0.2.0/24',))))
        self.assertEqual(self.peer(server.server_address).ask(Greeting(b'\0'), Choice), Choice(0))


class UpdatingClient:
    """A TLS client that asks for new keys, which Python's cannot: OpenSSL itself, in memory."""

    def __init__(self, sock):
        self.sock = sock
        names = [ctypes.util.find_library(name) for name in ('ssl', 'crypto')]
        if not all(names):
            raise unittest.SkipTest('OpenSSL is not where it can be found')
        self.ssl, self.crypto = map(ctypes.CDLL, names)
        if not hasattr(self.ssl, 'SSL_key_update'):
            raise unittest.SkipTest('OpenSSL is older than TLS 1.3')
        self.context = self.call(self.ssl.SSL_CTX_new, self.call(self.ssl.TLS_client_method))
        self.session = self.call(self.ssl.SSL_new, self.context)
        self.incoming, self.outgoing = [
            self.call(self.crypto.BIO_new, self.call(self.crypto.BIO_s_mem)) for _ in range(2)]
        self.ssl.SSL_set_bio(self.session, self.incoming, self.outgoing)
        self.ssl.SSL_set_connect_state(self.session)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.ssl.SSL_free(self.session)
        self.ssl.SSL_CTX_free(self.context)

    @staticmethod
    def call(function, *args):
        """The pointer that a function returns."""
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(*args))

    def output(self):
        buffer = ctypes.create_string_buffer(1 << 18)
        count = self.crypto.BIO_read(self.outgoing, buffer, len(buffer))
        return buffer.raw[:max(0, count)]

    def receive(self):
        self.sock.sendall(self.output())
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        self.crypto.BIO_write(self.incoming, data, len(data))

    def handshake(self):
        while self.ssl.SSL_do_handshake(self.session) != 1:
            self.receive()

    def write(self, data):
        self.ssl.SSL_write(self.session, data, len(data))
        self.sock.sendall(self.output())

    def read(self, count):
        """So many bytes, that come together."""
        buffer = ctypes.create_string_buffer(count)
        while self.ssl.SSL_read(self.session, buffer, count) != count:
            self.receive()
        return buffer.raw

    def connect(self, port):
        """Have the proxy connect to a port of this host; the reply."""
        self.handshake()
        self.write(Greeting(b'\0').pack())
        self.read(2)
        self.write(Request(1, Address('127.0.0.1', port)).pack())
        return self.read(10)[1]

    def updates(self, count, wants_answer=1):
        """The bytes of so many changes of keys, which ask for the peer's or not."""
        for _ in range(count):
            self.ssl.SSL_key_update(self.session, wants_answer)
            self.ssl.SSL_do_handshake(self.session)
        return self.output()


class TlsTest(FileCase):
    """SOCKS inside of TLS."""

    def test_an_end_without_notice(self):
        """TCP ends where TLS said nothing: still only that direction."""
        server, origin = self.serve(tls=self.context()), self.origin()
        with client_context().wrap_socket(socket.create_connection(server.server_address),
                                          server_hostname='localhost') as sock:
            near = Peer(sock)
            self.assertEqual(near.connect('127.0.0.1', origin.port).reply, 0)
            far = origin.take()
            near.send(b'question')
            socket.socket.shutdown(sock, socket.SHUT_WR)        # below TLS
            self.assertEqual(far.rest(), b'question')
            sent, received = Background(pour, far, 8 << 20, 1), hashlib.sha256()
            for data in iter(lambda: sock.recv(1 << 18), b''):
                received.update(data)
            self.assertEqual(received.hexdigest(), sent.result())

    def setUp(self):
        socks.background_loop()                 # its thread stays
        super().setUp()

    def context(self, client_ca=False):
        return socks.tls_context(self.write('cert', CERTIFICATE), self.write('key', KEY),
                                 self.write('ca', CERTIFICATE) if client_ca else None)

    def connect(self, server, address, context=None, **options):
        return self.enter(socks.create_connection(
            address, PATIENCE, proxy=f'socks5h+tls://{server.server_address}',
            ssl_context=context or client_context(), **options))

    def test_all_at_once(self):
        """Greeting, password, request and data in one segment, with and without TLS."""
        origin = self.origin(echo)
        data = b''.join(message.pack() for message in (
            Greeting(b'\2'), Credentials(b'bob', b's'),
            Request(1, Address('127.0.0.1', origin.port)))) + b'data'
        for context in None, self.context():
            server = self.serve(users={'bob': 's'}, tls=context)
            sock = self.enter(socket.create_connection(server.server_address, PATIENCE))
            peer = self.peer(self.enter(client_context().wrap_socket(
                sock, server_hostname='localhost')) if context else sock)
            peer.send(data)
            self.assertEqual(peer.read(5), b'\5\2\1\0\5')
            self.assertEqual(peer.read(13)[-4:], b'data')

    def tunnel_inside(self):
        """A server, and the ends of a connection through it, of which one is inside TLS."""
        server, origin = self.serve(tls=self.context()), self.origin()
        near = Peer(self.connect(server, ('localhost', origin.port)))
        return server, near, origin.take()

    def updating_client(self, server):
        """A client that takes little at a time."""
        sock = self.enter(socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)      # before a window is offered
        sock.settimeout(PATIENCE)
        sock.connect(server.server_address)
        return self.enter(UpdatingClient(sock))

    def test_wrong_name_of_the_proxy(self):
        self.scripted_names(lambda name: ['127.0.0.1'])
        server, origin = self.serve(tls=self.context()), self.origin()
        url = f'socks5h+tls://wrong.test:{server.server_address[1]}'
        with self.assertRaises(socks.ProxyError):
            socks.create_connection(('localhost', origin.port), PATIENCE, proxy=url,
                                    ssl_context=client_context())

    def test_a_client_without_certificate(self):
        """It gets the alert, although it has sent more: a close() with unread bytes is a reset."""
        self.change(socks, LINGER=PATIENCE)
        server = self.serve(tls=self.context(client_ca=True))
        sock = self.enter(socket.create_connection(server.server_address, PATIENCE))
        with self.assertRaisesRegex(ssl.SSLError, 'alert'):     # in TLS 1.2 at once
            tls = self.enter(client_context().wrap_socket(sock, server_hostname='localhost'))
            self.assertIn('certificate', self.line())
            for _ in range(2):
                tls.sendall(b'\5\1\0')
            tls.recv(1)

    def test_an_alert_in_the_negotiation(self):
        """In TLS 1.3, it comes after the handshake; the error tells it."""
        server = self.serve(tls=self.context(client_ca=True))
        with self.assertRaisesRegex(GENERAL, 'alert'):
            self.connect(server, ('localhost', 1))

    def test_a_client_without_tls(self):
        """It gets an end, not a reset."""
        server = self.serve(tls=self.context())
        peer = self.peer(server.server_address)
        peer.send(b'\5\1\0')
        self.assertEqual(peer.rest(), b'')

    def test_another_client_ca(self):
        """After a reload it counts for all who have not made their request."""
        old, new = self.context(), self.context()
        for context in old, new:
            context.verify_mode = ssl.CERT_OPTIONAL
        new.load_verify_locations(cadata=CERTIFICATE)
        for changed, code in ((False, 0), (True, 2)):
            server, origin = self.serve(tls=old), self.origin()
            with client_context().wrap_socket(
                    socket.create_connection(server.server_address),
                    server_hostname='localhost') as sock:
                peer = Peer(sock)
                peer.ask(Greeting(b'\0'), Choice)
                again = self.context()
                again.verify_mode = ssl.CERT_OPTIONAL
                server.reconfigure(Settings(tls=new if changed else again))
                request = Request(1, Address('127.0.0.1', origin.port))
                self.assertEqual(peer.ask(request, Response).reply, code)

    def test_reset_is_passed_on(self):
        """And does not look like an end, which TLS tells apart."""
        server, near, far = self.tunnel_inside()
        far.send(b'half of it')
        self.assertEqual(near.read(10), b'half of it')
        far.reset()
        with self.assertRaises(ConnectionResetError):
            near.read(1)

    def test_what_is_cut(self):
        """A stop in the middle of a transfer is no end, as close_notify would have it."""
        server, near, far = self.tunnel_inside()
        far.send(b'half of it')
        self.assertEqual(near.read(10), b'half of it')
        server.server_close()
        for peer in near, far:
            with self.assertRaises(ConnectionResetError):
                peer.rest()
        self.assertIn(': server closed, ', self.lines[0])

    def test_a_layer_whose_socket_fails(self):
        """It drops what it holds, so that nobody waits for it."""
        layer, client = self.tls_pair()
        loop = socks.Loop()
        self.addCleanup(loop.close)
        layer.count_in(loop)
        with self.assertRaises(BlockingIOError):
            while True:
                layer.send(b'x' * 10000)
        layer.shutdown(socket.SHUT_WR)
        self.assertTrue(layer.unsent)
        self.assertGreater(loop.held, 0)
        client.close()
        with self.assertRaises(OSError):
            layer.flush()
        self.assertFalse(layer.unsent)
        self.assertEqual(loop.held, 0)

    def test_a_layer_that_cannot_say_its_end(self):
        """The client reads nothing, the target reads nothing and has ended, the client resets: the
        loop waits for the target."""
        server, origin = self.serve(tls=self.context()), self.origin()
        client = self.updating_client(server)
        far, tunnel = self.flooded(server, origin, client)
        far.finish()
        eventually(lambda: tunnel.down.done and tunnel.up.source.unsent)
        client.sock.settimeout(0.3)
        with self.assertRaises(socket.timeout):
            for _ in range(10000):
                client.write(bytes(16000))
        Peer(client.sock).reset()
        eventually(lambda: not tunnel.up.events & socks.WRITE)      # else it would be told for ever
        with contextlib.suppress(ConnectionError):
            far.rest()
        self.assertIn(': client: ', self.line())

    def test_endless_changes_of_keys(self):
        """Who has the server answer them and does not read is cut off, and they count."""
        server, origin = self.serve(tls=self.context()), self.origin()
        client = self.updating_client(server)
        _, tunnel = self.flooded(server, origin, client)
        self.assertTrue(tunnel.loop.held)
        tunnel.up.source.LARGEST = 100                  # sooner than usually
        with self.assertRaises(ConnectionError):
            while True:
                client.sock.sendall(client.updates(1))
        self.assertIn(': client: TLS: ', self.line())
        self.assertEqual(tunnel.loop.held, 0)

    def test_changes_of_keys_without_data(self):
        """Many are cut off, also if the client reads the answers; with data between them they are
        answered."""
        server, origin = self.serve(tls=self.context()), self.origin()
        for number, lasts in ((10, True), (1000, False)):
            client = self.updating_client(server)
            self.assertEqual(client.connect(origin.port), 0)
            far = origin.take()
            with self.subTest(number), contextlib.suppress(ConnectionError):
                for _ in range(30):
                    client.sock.sendall(client.updates(number))
                    client.write(b'data')
                    self.assertEqual(far.read(4), b'data')
                self.assertTrue(lasts)
        self.assertIn(': client: TLS: the peer causes', self.line())

    def test_changes_of_keys_without_answers(self):
        """Those that want no answer cost time, too."""
        server, origin = self.serve(tls=self.context()), self.origin()
        client = self.updating_client(server)
        self.assertEqual(client.connect(origin.port), 0)
        with self.assertRaises(ConnectionError):
            for _ in range(100):
                client.sock.sendall(client.updates(200, 0))
        self.assertIn(': client: TLS: the peer changes keys', self.line())

    def flooded(self, server, origin, client):
        """The target's side and the tunnel of a client that asks for new keys and takes none, until
        the server holds some."""
        self.assertEqual(client.connect(origin.port), 0)
        far = origin.take()

        def found():
            items = [item for loop in server.loops() for item in list(loop.items)]
            return isinstance(items[0], socks.Tunnel) and items[0]
        tunnel = eventually(found)
        tunnel.up.source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        tunnel.up.source.UNASKED = tunnel.up.source.FRUITLESS = float('inf')
        tunnel.up.size = 1 << 10        # at a time, however quickly the client goes on

        def has_much():
            client.sock.sendall(client.updates(50))
            return tunnel.loop.held > 1 << 12
        eventually(has_much)
        return far, tunnel
    def test_urgent_data(self):
        """It stays in the stream of a program that is in front of TLS."""
        _, near, far = self.tunnel_inside()
        for one, other in ((near, far), (far, near)):
            one.send(b'before')
            one.sock.send(b'!!', socket.MSG_OOB)
            one.send(b'after')
            self.assertEqual(other.read(13), b'before!!after')

    def test_bind_and_a_part_of_a_record(self):
        """What has come of the client's next message does not hide the peer."""
        server = self.serve(tls=self.context())
        peer, sent, received = self.peer(server.server_address), ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context().wrap_bio(received, sent, server_hostname='localhost')

        def until_done(function, *args):
            while True:
                try:
                    return function(*args)
                except ssl.SSLWantReadError:
                    peer.send(sent.read())
                    received.write(peer.sock.recv(65536))

        def ask(message, answer_class):
            tls.write(message.pack())
            peer.send(sent.read())
            return answer_class.unpack(lambda n: until_done(tls.read, n))

        until_done(tls.do_handshake)
        peer.send(sent.read())
        ask(Greeting(b'\0'), Choice)
        address = ask(Request(socks.Command.BIND, Address('127.0.0.1', 0)), Response).address
        tls.write(bytes(1000))
        record = sent.read()
        peer.send(record[:500])
        time.sleep(0.05)
        target = self.peer(address)
        self.assertEqual(Response.unpack(lambda n: until_done(tls.read, n)).reply, 0)
        peer.send(record[500:])
        self.assertEqual(target.read(1000), bytes(1000))

    def test_the_usual_certificates_are_read_once(self):
        usual = socks.usual_context(None, None)
        self.assertIs(socks.usual_context(None, None), usual)
        self.assertIsNot(socks.usual_context(self.write('ca', CERTIFICATE), None), usual)

    def test_bulk_both_ways_and_half_close(self):
        _, near, far = self.tunnel_inside()
        self.exchange(near, far, 20 << 20)
        self.assertRegex(self.line(), r': done, 209\d+ bytes up, 209\d+ down')

    def test_one_direction_ends(self):
        _, near, far = self.tunnel_inside()
        near.finish()
        self.assertEqual(far.rest(), b'')
        far.send(b'still there')
        self.assertEqual(near.read(11), b'still there')
        far.finish()
        self.assertEqual(near.rest(), b'')

    def test_a_slow_reader_slows_the_sender(self):
        _, near, far = self.tunnel_inside()
        far.sock.settimeout(0.3)
        sent = 0
        with self.assertRaises(socket.timeout):
            while sent < 1 << 28:
                sent += far.sock.send(b'x' * 65536)
        self.assertLess(sent, 1 << 26)
        near.finish()
        received = 0
        while received < sent:
            received += len(near.sock.recv(1 << 20))
        self.assertEqual(received, sent)

    def test_last_words_of_who_reads_no_more(self):
        """They arrive, although what is held for who said them cannot be sent."""
        server, origin = self.serve(tls=self.context()), self.origin()
        with client_context().wrap_socket(socket.create_connection(server.server_address),
                                          server_hostname='localhost') as sock:
            near, words = Peer(sock), b'last words' * 4000
            self.assertEqual(near.connect('127.0.0.1', origin.port).reply, 0)
            far = origin.take()
            far.sock.settimeout(0.3)
            with self.assertRaises(socket.timeout):
                far.send(bytes(1 << 28))
            busy, free = threading.Event(), threading.Event()
            tunnel, = (item for loop in server.loops() for item in loop.items)
            tunnel.loop.call(tunnel, lambda: busy.set() or free.wait(PATIENCE))
            self.assertTrue(busy.wait(PATIENCE))
            near.send(words)
        free.set()                      # words and end are there at once
        far.sock.settimeout(PATIENCE)
        self.assertEqual(far.read(len(words)), words)

    def test_costly_handshakes(self):
        """Where a key makes them slow, they are done in other threads than the loop's."""
        origin, server = self.origin(echo), self.serve(tls=server_context())
        self.addCleanup(setattr, socks.TlsLayer, 'QUICK', socks.TlsLayer.QUICK)
        for quick, is_costly in ((PATIENCE, False), (0, True), (0, True)):
            socks.TlsLayer.QUICK = quick          # what is measured counts from the next step on
            with self.subTest(quick):
                self.connect(server, ('127.0.0.1', origin.port)).sendall(b'x')
                self.assertEqual(is_costly, any(
                    thread.name == 'socks-pool' for thread in threading.enumerate()))
        with Peer(server.server_address) as peer:       # an error is told from there, too
            peer.send(b'\x16\3\1\0\4\xff\0\0\0')
            self.assertEqual(peer.read(1), b'\x15')
        eventually(lambda: any('no request: ' in line for line in self.lines))

    def test_client_certificates(self):
        server, origin = self.serve(tls=self.context(True), users={'x': 'y'}), self.origin(echo)
        context = client_context()
        with self.assertRaises((GENERAL, ConnectionError)):
            self.connect(server, ('localhost', origin.port)).recv(1)
        context.load_cert_chain(self.write('cert', CERTIFICATE), self.write('key', KEY))
        self.connect(server, ('localhost', origin.port), context).close()
        eventually(lambda: any(' localhost SOCKS5 CONNECT' in line for line in self.lines))

    def test_ident_beside_a_certificate(self):
        """The host cannot change who the certificate says that it is."""
        server, origin = self.serve(tls=self.context(True), ident=True), self.origin(echo)
        self.addCleanup(setattr, socks, 'IDENT_PORT', socks.IDENT_PORT)
        context = client_context()
        context.load_cert_chain(self.write('cert', CERTIFICATE), self.write('key', KEY))
        for userid, code in (b'alice', 0x5d), (b'localhost', 0x5a):
            def tell(peer):
                query = peer.sock.makefile('rb').readline().strip()
                peer.send(query + b':USERID:UNIX:' + userid + b'\r\n')

            with self.subTest(userid), Origin(tell) as ident, context.wrap_socket(
                    socket.create_connection(server.server_address), False, True, True,
                    'localhost') as sock, Peer(sock) as peer:
                socks.IDENT_PORT = ident.port
                request = Request4(1, Address('127.0.0.1', origin.port), userid)
                self.assertEqual(peer.ask(request, Response4).code, code)
        eventually(lambda: len(self.lines) == 2)
        self.assertEqual([line.split()[1] for line in self.lines], ['localhost'] * 2)

    @needs('openssl')
    def test_a_certificate_with_two_names(self):
        """It is not said which of them is the user."""
        files = self.write('cert2', ''), self.write('key2', '')
        done = run('openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                   'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2',
                   '-subj', '/CN=bob/CN=eve', '-out', files[0], '-keyout', files[1])
        self.assertEqual(done.returncode, 0, done.stderr)
        tls = socks.tls_context(self.write('cert', CERTIFICATE), self.write('key', KEY), files[0])
        server, context = self.serve(tls=tls), client_context()
        context.load_cert_chain(*files)
        with self.assertRaises((GENERAL, ConnectionError)):
            self.connect(server, ('127.0.0.1', 1), context).recv(1)
        self.assertIn('refused: a certificate with 2 common names, expected one', self.line())

    @unittest.skipUnless(hasattr(ssl, 'OP_NO_RENEGOTIATION'), 'needs Python 3.7')
    def test_no_renegotiation(self):
        self.assertTrue(self.context().options & ssl.OP_NO_RENEGOTIATION)

    def test_udp_inside(self):
        """As the client half sends datagrams, also where they could be in the clear."""
        class Old(socks.Handler):
            do_UDP_IN_TCP = None

        target = self.enter(Echo())
        server = self.serve(tls=self.context(), udp_over_plain=True)
        old = self.serve(Old, tls=self.context(), udp_over_plain=True)
        url, old = (f'socks5h+tls://{each.server_address}' for each in (server, old))
        for proxy in url, [url, url], [old, url]:
            with self.subTest(proxy), socks.socksocket(type=socket.SOCK_DGRAM, proxy=proxy) as sock:
                sock.ssl_context = client_context()
                sock.settimeout(PATIENCE)
                for data in b'x', b'', os.urandom(60000):
                    sock.sendto(data, target.address)
                    self.assertTrue(sock.recvfrom(1 << 16) == (b'E:' + data, target.address))
        with socks.socksocket(type=socket.SOCK_DGRAM, proxy=old) as sock:
            sock.ssl_context = client_context()
            with self.assertRaises(socks.SOCKS5Error) as caught:
                sock.sendto(b'x', target.address)
            self.assertEqual(caught.exception.errno, errno.EOPNOTSUPP)

    def test_udp_beside_tls_is_refused(self):
        """Unless it is allowed to be in the clear."""
        target = self.enter(Echo())
        for allowed in (False, True):
            server = self.serve(tls=self.context(), udp_over_plain=allowed)
            with self.peer(server.server_address) as peer, socket.socket(
                    type=socket.SOCK_DGRAM) as sock:
                peer.sock = self.enter(client_context().wrap_socket(
                    peer.sock, server_hostname='127.0.0.1'))
                peer.ask(Greeting(b'\0'), Choice)
                peer.send(Request(3, Address('0.0.0.0', 0)).pack())
                reply, relay = Response.unpack(peer.read)
                self.assertEqual(reply, 0 if allowed else Reply.COMMAND_NOT_SUPPORTED)
                self.assertEqual(any('UDP_ASSOCIATE is not switched on beside TLS '
                                     '(--udp-over-plain),' in line for line in self.lines),
                                 not allowed)
                if allowed:
                    sock.settimeout(PATIENCE)
                    sock.sendto(Datagram(target.address, b'x').pack(), relay)
                    self.assertEqual(Datagram.unpack(sock.recv(100)).payload, b'E:x')

    def test_no_tls(self):
        """Plain SOCKS, at once, silence or the end of it where TLS is expected."""
        server = self.serve(tls=self.context(), handshake_timeout=0.3)
        peers = [self.peer(server.server_address) for _ in range(3)]
        for peer, data in zip(peers, ('050100', '', '16030100')):
            peer.send(hexed(data))
        for peer in peers:
            with contextlib.suppress(ConnectionResetError):
                peer.rest()
        eventually(lambda: len(self.lines) == 2)
        self.assertIn('refused: first byte 0x05, expected TLS', self.lines[0])
        self.assertIn('TLS - -: no request: ', self.lines[1])

    def test_old_tls(self):
        """1.1 is not spoken."""
        server = self.serve(tls=self.context())
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')             # of that it is old
            old.options |= ssl.OP_NO_TLSv1_2 | ssl.OP_NO_TLSv1_3
            with contextlib.suppress(AttributeError):   # Python 3.6
                old.minimum_version = ssl.TLSVersion.TLSv1
        with socket.create_connection(server.server_address) as sock, \
                self.assertRaises((ssl.SSLError, ConnectionError)):
            old.wrap_socket(sock)

    def test_files(self):
        """The error names the option, the file, and what is wrong with it."""
        files = {'cert': CERTIFICATE, 'key': KEY, 'both': CERTIFICATE + KEY, 'other': OTHER_KEY,
                 'locked': ENCRYPTED_KEY, 'locks': CERTIFICATE + ENCRYPTED_KEY, 'empty': ''}
        for name, text in files.items():
            self.write(name, text)
        for names, message in (
                (['none'], '--tls-cert none: No such file or directory'),
                (['.'], '--tls-cert .: Is a directory'),
                (['empty'], '--tls-cert empty: expected a certificate, as PEM'),
                (['key', 'cert'], '--tls-cert key: expected a certificate, as PEM'),
                (['cert'], '--tls-cert cert without --tls-key: expected a private key for '
                           'cert, as PEM'),
                (['cert', 'cert'], '--tls-key cert: expected a private key for cert, as PEM'),
                (['cert', 'other'], '--tls-key other: expected a private key for cert, as '
                                    'PEM: '),
                (['cert', 'none'], '--tls-key none: No such file or directory'),
                (['cert', 'locked'], '--tls-key locked: the private key is encrypted, expected '
                                     'one without a passphrase'),
                (['locks'], '--tls-cert locks without --tls-key: the private key is encrypted'),
                (['both', None, 'none'], '--tls-client-ca none: No such file or directory'),
                (['both', None, 'key'], '--tls-client-ca key: expected a certificate, as PEM')):
            paths = [name and os.path.join(self.folder, name) for name in names]
            with self.subTest(names), self.assertRaises(socks.FileError) as caught:
                socks.tls_context(*paths)
            text = str(caught.exception).replace(self.folder + os.sep, '')
            self.assertEqual(text[:len(message)], message)
            self.assertEqual('PEM lib' in text or text.count('\n'), 0)

    def test_a_certificate_that_is_not_trusted(self):
        """The error tells where it is looked for, unless the caller has said that."""
        url = f'socks5h+tls://{self.serve(tls=self.context()).server_address}'
        trusted, other = self.write('trusted', CERTIFICATE), self.write('other', OTHER_CERTIFICATE)
        for path, message in (
                ('', 'expected the certificate that signed it in the file that SSL_CERT_FILE '),
                (other, f'expected the certificate that signed it in {other} (SSL_CERT_FILE) '),
                (other + 'x', f'SSL_CERT_FILE {other}x: No such file or directory '),
                (self.folder, f'SSL_CERT_FILE {self.folder}: Is a directory '),
                (self.write('wrong', KEY), f'SSL_CERT_FILE {self.folder}/wrong: expected a cert')):
            with self.subTest(path), self.assertRaises(socks.GeneralProxyError) as caught, \
                    unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=path):
                socks.create_connection(('h', 1), PATIENCE, proxy=url)
            self.assertIn('; ' + message, str(caught.exception))
            self.assertIsInstance(caught.exception.socket_err, getattr(
                ssl, 'SSLCertVerificationError', ssl.SSLError))         # Python 3.6 has none
        by_name = url.replace('127.0.0.1', '127.1')     # which the certificate lacks
        for url, context in (url, ssl.create_default_context(cafile=other)), (by_name, None):
            with self.assertRaises(socks.GeneralProxyError) as caught, \
                    unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=trusted):
                socks.create_connection(('h', 1), PATIENCE, proxy=url, ssl_context=context)
            self.assertIsInstance(caught.exception.socket_err, ssl.SSLError)
            self.assertNotIn('SSL_CERT_FILE', str(caught.exception))


# ----------------------------------------------------------------------------------------- GSSAPI

SBIN = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'

KRB5_CONF = """
[libdefaults]
 default_realm = SOCKS.TEST
 dns_lookup_kdc = false
 dns_lookup_realm = false
 dns_canonicalize_hostname = false
 rdns = false
 udp_preference_limit = 1
[realms]
 SOCKS.TEST = {
  kdc = 127.0.0.1:%d
 }
"""

KDC_CONF = """
[kdcdefaults]
 kdc_listen = 127.0.0.1:%d
 kdc_tcp_listen = 127.0.0.1:%d
[realms]
 SOCKS.TEST = {
  database_name = %s/principal
  key_stash_file = %s/stash
  acl_file = %s/kadm5.acl
  supported_enctypes = aes256-cts-hmac-sha1-96:normal
 }
[logging]
 kdc = FILE:%s/kdc.log
"""


# What an HTTP client sends, and the status that it gets; `{port}` is a target that answers any
# head with its bytes, `{refused}`, `{silent}`, `{odd}` (which speaks no HTTP) and `{gone}` (which
# ends at once) are others.  `\n` stands for CR LF.
STATUSES = [
    ('CONNECT', 'CONNECT 127.0.0.1:{port} HTTP/1.1\nHost: x\n\n', 200),
    ('CONNECT, HTTP/1.0', 'CONNECT 127.0.0.1:{port} HTTP/1.0\n\n', 200),
    ('CONNECT, name', 'CONNECT LOCALHOST.:{port} HTTP/1.1\nHost: x\n\n', 200),
    ('CONNECT, IPv6', 'CONNECT [::1]:{port} HTTP/1.1\nHost: x\n\n', 200),
    ('GET', 'GET http://127.0.0.1:{port}/ HTTP/1.1\nHost: x\n\n', 200),
    ('GET, HTTP/1.0', 'GET http://127.0.0.1:{port}/ HTTP/1.0\n\n', 200),
    ('GET, IPv6', 'GET http://[::1]:{port} HTTP/1.1\n\n', 200),
    ('HEAD', 'HEAD http://127.0.0.1:{port}/ HTTP/1.1\n\n', 200),
    ('POST', 'POST http://127.0.0.1:{port}/ HTTP/1.1\nContent-Length: 3\n\nabc', 200),
    ('chunked',
     'POST http://127.0.0.1:{port}/ HTTP/1.1\nTransfer-Encoding: chunked\n\n3\nabc\n0\n\n', 200),
    ('refused', 'CONNECT 127.0.0.1:{refused} HTTP/1.1\nHost: x\n\n', 502),
    ('GET, refused', 'GET http://127.0.0.1:{refused}/ HTTP/1.1\n\n', 502),
    ('silent', 'CONNECT 127.0.0.1:{silent} HTTP/1.1\nHost: x\n\n', 504),
    ('GET, silent', 'GET http://127.0.0.1:{silent}/ HTTP/1.1\n\n', 504),
    ('no such name', 'CONNECT no.such.invalid:80 HTTP/1.1\nHost: x\n\n', 502),
    ('GET, no such name', 'GET http://no.such.invalid/ HTTP/1.1\n\n', 502),
    ('no HTTP', 'GET http://127.0.0.1:{odd}/ HTTP/1.1\n\n', 502),
    ('an end', 'GET http://127.0.0.1:{gone}/ HTTP/1.1\n\n', 502),
    ('no name', 'CONNECT a..b:80 HTTP/1.1\nHost: x\n\n', 400),
    ('NUL as UTF-8', 'GET http://a%00b/ HTTP/1.1\n\n', 400),
    ('a browser that is lost', 'GET / HTTP/1.1\nHost: x\n\n', 400),
    ('another protocol', 'EHLO x\n', 400), ('lower case', 'get / HTTP/1.1\n\n', 501),
    ('https', 'GET https://127.0.0.1/ HTTP/1.1\n\n', 501),
    ('body for a tunnel', 'CONNECT 127.0.0.1:{port} HTTP/1.1\nContent-Length: 1\n\nx', 400),
    ('chunk', 'POST http://127.0.0.1:{port}/ HTTP/1.1\nTransfer-Encoding: chunked\n\nxyz\n', 400),
    ('later chunk',
     'POST http://127.0.0.1:{quiet}/ HTTP/1.1\nTransfer-Encoding: chunked\n\n1\nabc', 400),
    ('long head', 'GET http://127.0.0.1:{port}/ HTTP/1.1\nA: ' + 'b' * 66000, 431),
]
# What a target answers, and what the client gets of it; None: 502.
ANSWERS = [
    ('plain', 'HTTP/1.1 200 OK\nA: b\n\nbody', 'HTTP/1.1 200 OK\nA: b\n@\n\nbody'),
    ('hop by hop', 'HTTP/1.1 200 OK\nKeep-Alive: 5\nConnection: keep-alive, X\nX: y\nUpgrade: h2\n'
     'Proxy-Authenticate: Basic\nA: b\nA: c\n\n', 'HTTP/1.1 200 OK\nA: b\nA: c\n@\n\n'),
    ('interim', 'HTTP/1.1 103 Early Hints\nLink: x\n\nHTTP/1.1 100\n\nHTTP/1.1 204 \n\n',
     'HTTP/1.1 103 Early Hints\nLink: x\nVia: 1.1 socks.py\n\nHTTP/1.1 100\nVia: 1.1 socks.py\n\n'
     'HTTP/1.1 204 \n@\n\n'),
    ('old', 'HTTP/1.0 200 OK\n\nx', 'HTTP/1.0 200 OK\nVia: 1.0 socks.py\nConnection: close\n\nx'),
    ('version', 'HTTP/2 200 OK\n\n', None),
    ('careless', 'HTTP/1.1 200 OK\nA : b\nnonsense\nC: d\n  e\nSet-Cookie: f=ä\n\nx',
     'HTTP/1.1 200 OK\nA: b\nC: d e\nSet-Cookie: f=ä\n@\n\nx'),
    ('both lengths', 'HTTP/1.1 200 OK\nContent-Length: 5\nTransfer-Encoding: chunked\n\n0\n\n',
     'HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n@\n\n0\n\n'),
    ('SSH', 'SSH-2.0-x\n\n', None), ('a part', 'HTTP/1.1 200 OK\nA: b\n', None),
    ('nothing', '', None),
    ('endless', 'HTTP/1.1 200 OK\nA: ' + 'b' * 66000, None),
    ('endless interim', 'HTTP/1.1 100 Continue\n\n' * 100 + 'HTTP/1.1 200 OK\n\n', None),
    ('many fields', 'HTTP/1.1 200 OK\n' + 'a: b\n' * 201 + '\n', None),
    ('a tunnel unasked', 'HTTP/1.1 101 Switching\nConnection: Upgrade\nUpgrade: x\n\n', None),
]
LAST = 'Via: 1.1 socks.py\nConnection: close'
WEBSOCKET = ('GET http://127.0.0.1:{port}/ HTTP/1.1\nConnection: Upgrade\nUpgrade: websocket\n\n')
SWITCHING = b'HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n'


class HttpCase(FileCase):

    def setUp(self):
        super().setUp()
        self.origin_seen = self.origin(self.tell_head)
        self.port = self.origin_seen.port
        try:
            self.origin(self.tell_head, host='::1', port=self.port)
            self.lacking = 'nothing'
        except OSError:                 # no IPv6 here
            self.lacking = '::1'

    @staticmethod
    def tell_head(peer):
        """An HTTP server that answers with what it was sent, but echoes in a tunnel."""
        data = b''
        while b'\r\n\r\n' not in data:
            more = peer.sock.recv(65536)
            if not more:
                return
            data += more
        length = re.search(rb'(?i)content-length: ([0-9]+)', data)
        if length:
            data += peer.read(int(length.group(1)) - len(data.partition(b'\r\n\r\n')[2]))
        while b'chunked' in data and not data.endswith(b'0\r\n\r\n'):
            data += peer.read(1)
        peer.send(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % len(data)
                  + data * (data[:4] != b'HEAD'))

    def ask(self, server, text, step=None):
        """The status, the head and the body of the answer to a text in which `\\n` is CR LF."""
        data = http_bytes(text.replace('{port}', str(self.port)))
        with Peer(server.server_address) as peer:
            with contextlib.suppress(ConnectionError):      # what is refused is not read to its end
                peer.send(data, step)
            head = b''
            while not head.endswith(b'\r\n\r\n'):
                head += peer.read(1)
            status = int(head[9:12])
            is_tunnel = status == 200 and text.startswith('CONNECT')
            return status, head.decode('latin-1'), b'' if is_tunnel else peer.rest()


class HttpTest(HttpCase):
    """HTTP clients, on the port of SOCKS."""

    def test_statuses(self):
        ports = {'refused': self.refused_port(), 'silent': self.silent_port(),
                 'odd': self.origin(lambda peer: peer.send(b'220 x\r\n\r\n') or peer.rest()).port,
                 'gone': self.origin(lambda peer: peer.sock.recv(10)).port,
                 'quiet': self.origin(Peer.rest).port}
        server = self.serve(connect_timeout=0.3)
        for (name, text, status), step in itertools.product(STATUSES, (None, 1)):
            if self.lacking in text or step and (len(text) >= 1000 or 'silent' in name):
                continue
            for place, port in ports.items():
                text = text.replace('{%s}' % place, str(port))
            with self.subTest(name, step=step):
                got, head, body = self.ask(server, text, step)
                self.assertEqual(got, status, head)
                if status > 200:
                    self.assertIn('\r\nConnection: close\r\n', head)
                    self.assertIn(f'\r\nContent-Length: {len(body)}\r\n', head)
                    self.assertTrue(body.decode().endswith('\n'))
                    eventually(lambda: [line for line in self.lines if ' HTTP ' in line])
                    self.assertRegex(self.lines.pop(), ': (refused|failed): ')
                else:
                    eventually(lambda: self.lines)
                    self.assertIn(': done,', self.lines.pop())
        self.assertEqual(self.ask(server, 'HEAD http://127.0.0.1:%d/ HTTP/1.1\n\n'
                                  % ports['refused'])[::2], (502, b''))

    def test_help_for_who_is_lost(self):
        for text in ('GET / HTTP/1.1\nHost: x\n\n', 'OPTIONS * HTTP/1.1\nHost: x\n\n'):
            status, _, body = self.ask(self.serve(), text)
            self.assertEqual(status, 400)
            self.assertRegex(body.decode(), 'proxy for SOCKS4, SOCKS4a, SOCKS5 and HTTP')
        server = self.serve(http=False)
        for text in ('GET / HTTP/1.1\n\n', 'CONNECT 127.0.0.1:{port} HTTP/1.1\n\n', 'xyz'):
            status, _, body = self.ask(server, text)
            self.assertEqual(status, 501)
            self.assertIn(b'SOCKS5, not HTTP', body)
        self.assertIn('HTTP, which --no-http switches off, expected SOCKS,', self.lines[0])

    def test_tunnel(self):
        """What follows the head at once is kept; either side ends for itself."""
        origin, server = self.origin(), self.serve()
        near = self.peer(server.server_address)
        near.send(http_bytes(f'CONNECT 127.0.0.1:{origin.port} HTTP/1.1\nHost: x\n\nearly'))
        self.assertEqual(near.read(39), b'HTTP/1.1 200 Connection established\r\n\r\n')
        far = origin.take()
        self.assertEqual(far.read(5), b'early')
        self.exchange(near, far, 1 << 20)
        self.assertRegex(self.line(), r' - HTTP CONNECT 127\.0\.0\.1:\d+: done, \d+ bytes up')

    def test_one_request_each(self):
        """What follows the first request does not get to its target, however it comes."""
        second = 'GET http://127.0.0.1:{port}/second HTTP/1.1\nHost: x\n\n'
        for text in ('GET http://127.0.0.1:{port}/ HTTP/1.1\nHost: x\n\n',
                     'POST http://127.0.0.1:{port}/ HTTP/1.1\nContent-Length: 3\n\nabc',
                     'POST http://127.0.0.1:{port}/ HTTP/1.1\nTransfer-Encoding: chunked\n\n'
                     '3\nabc\n0\n\n', WEBSOCKET):
            for step in (None, 1):
                with self.subTest(text, step=step):
                    status, head, body = self.ask(self.serve(), text + second, step)
                    self.assertEqual(status, 200)
                    self.assertEqual(body.count(b'HTTP/1.1'), 1, body)
                    self.assertEqual(body.count(b'\r\nHost: 127.0.0.1:%d\r\n' % self.port), 1)
                    self.assertIn('\r\nConnection: close\r\n', head)
        near = self.peer(self.serve().server_address)       # nor does what comes later
        near.send(http_bytes(f'GET http://127.0.0.1:{self.port}/ HTTP/1.1\nHost: x\n\n'))
        near.read(12)
        near.send(http_bytes(second * 1000))
        self.assertEqual(near.rest().count(b'GET '), 1)

    def test_answers(self):
        for (name, answer, expected), step in itertools.product(ANSWERS, (None, 1)):
            if step and len(answer) >= 1000:
                continue
            answer = answer.replace('@', LAST)
            with self.subTest(name, step=step):
                origin = self.origin(lambda peer: self.answer(peer, http_bytes(answer), step))
                near = self.peer(self.serve().server_address)
                near.send(http_bytes(f'GET http://127.0.0.1:{origin.port}/ HTTP/1.1\n\n'))
                got = near.rest()
                if expected:
                    self.assertEqual(got, http_bytes(expected.replace('@', LAST)))
                else:
                    self.assertIn(b'HTTP/1.1 502 Bad Gateway\r\n', got)
                    self.assertRegex(got, b'\r\nConnection: close\r\n\r\n.+\n$')
        bare = self.origin(lambda peer: self.answer(peer, b'HTTP/1.1 200 OK\nA: b\n\nbody', 1))
        self.assertEqual(self.ask(self.serve(),
                                  f'GET http://127.0.0.1:{bare.port}/ HTTP/1.1\n\n')[1:],
                         (f'HTTP/1.1 200 OK\r\nA: b\r\n{LAST}\r\n\r\n'.replace('\nC', '\r\nC')
                          .replace('\r\r', '\r'), b'body'))

    @staticmethod
    def answer(peer, data, step):
        HttpTest.head(peer)
        peer.send(data, step)

    def test_100_continue(self):
        """The target's word comes before the body."""
        origin, server = self.origin(), self.serve()
        near = self.peer(server.server_address)
        near.send(http_bytes(f'PUT http://127.0.0.1:{origin.port}/ HTTP/1.1\nExpect: 100-continue\n'
                             'Content-Length: 4\n\n'))
        far = origin.take()
        self.assertIn(b'Expect: 100-continue\r\n', self.head(far))
        far.send(b'HTTP/1.1 100 Continue\r\n\r\n')
        self.assertIn(b' 100 Continue\r\n', self.head(near))
        near.send(b'bodyGET /second')
        self.assertEqual(far.read(4), b'body')
        far.send(b'HTTP/1.1 204 No Content\r\n\r\n')
        self.assertIn(b' 204 No Content\r\n', self.head(near))
        near.finish()
        self.assertEqual(far.rest(), b'')

    @staticmethod
    def head(peer):
        data = b''
        while not data.endswith(b'\r\n\r\n'):
            data += peer.read(1)
        return data

    def test_large_bodies(self):
        """Of any size, both ways at once, and a slow side holds up the other."""
        size, server = 8 << 20, self.serve()
        for fields, pack in (('Content-Length: %d' % size, lambda data: data),
                             ('Transfer-Encoding: chunked',
                              lambda data: b'%x\r\n%b\r\n' % (len(data), data))):
            with self.subTest(fields):
                origin = self.origin()
                near = self.peer(server.server_address)
                near.send(http_bytes(f'POST http://127.0.0.1:{origin.port}/ HTTP/1.1\n{fields}\n'
                                     '\n'))
                far = origin.take()
                self.head(far)
                far.send(b'HTTP/1.1 200 OK\r\n\r\n')
                self.head(near)
                block = random.Random(1).getrandbits(8 << 16).to_bytes(1 << 16, 'big')
                end = b'0\r\n\r\n' if 'chunked' in fields else b''
                body = pack(block) * (size >> 16) + end
                sent = Background(near.send, body + b'GET /second'), Background(pour, far, size, 2)
                digest = Background(drink, near)
                self.assertEqual(far.read(len(body)), body)
                self.assertEqual(sent[1].result(), digest.result())
                sent[0].result()
                near.finish()
                self.assertEqual(far.rest(), b'')

    def test_upgrade(self):
        origin, server = self.origin(), self.serve()
        text = WEBSOCKET.replace('{port}', str(origin.port))
        near = self.peer(server.server_address)
        near.send(http_bytes(text))
        far = origin.take()
        self.assertIn(b'\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n', self.head(far))
        far.send(SWITCHING + b'early')
        self.assertIn(b'\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n', self.head(near))
        self.assertEqual(near.read(5), b'early')
        self.exchange(near, self.enter(far), 1 << 20)
        near = self.peer(server.server_address)     # a request within what could be a tunnel
        near.send(http_bytes(text + 'GET /second HTTP/1.1\n\n'))
        far = origin.take()
        self.head(far)
        far.send(SWITCHING)
        self.assertIn(b' 502 ', self.head(near))
        near.send(b'GET /third HTTP/1.1\r\n\r\n')
        near.finish()
        self.assertEqual(self.enter(far).rest(), b'')
        far.sock.close()
        eventually(lambda: any('HTTP GET' in line and ': failed: unexpected HTTP answer 101' in line
                               for line in self.lines))

    def test_an_answer_of_ours_gets_through(self):
        """Also to a client that is still sending."""
        origin = self.origin(Peer.rest)
        near = self.peer(self.serve().server_address)
        near.send(http_bytes(f'PUT http://127.0.0.1:{origin.port}/ HTTP/1.1\n'
                             'Transfer-Encoding: chunked\n\n1\nxy\n'))
        for _ in range(20):
            near.send(bytes(10000))
        self.assertEqual(self.head(near)[9:12], b'400')
        near.finish()
        near.rest()
        eventually(lambda: any('HTTP PUT' in line and ': refused: HTTP chunk' in line
                               for line in self.lines))

    def test_the_client_or_target_goes(self):
        """At any point; nothing is left, and a reset is passed on."""
        server = self.serve()
        for text in ('GET http://127.0.0.1:{0}/ HTTP/1.1\n\n',
                     'PUT http://127.0.0.1:{0}/ HTTP/1.1\nContent-Length: 9\n\nabc'):
            for end in (Peer.finish, Peer.reset):
                origin = self.origin()
                near = self.peer(server.server_address)
                near.send(http_bytes(text.format(origin.port)))
                far = origin.take()
                self.head(far)
                end(near)
                with contextlib.suppress(ConnectionError):
                    self.assertIn(far.rest(), (b'', b'abc'))
                far.sock.close()
        eventually(lambda: not server.clients)

    def test_rules(self):
        server = self.serve(rules=self.rules(f'deny connect to 127.0.0.2\nallow connect user bob '
                                             f'from 127.0.0.0/8 to 127.0.0.0/8 {self.port}\n'),
                            users={'bob': 'secret'})
        bob = 'Proxy-Authorization: Basic Ym9iOnNlY3JldA==\n\n'
        for host, port, status in (('127.0.0.1', self.port, 200), ('127.0.0.2', self.port, 403),
                                   ('[::ffff:127.0.0.2]', self.port, 403),
                                   ('127.2', self.port, 403),
                                   ('127.0.0.1', 1, 403), ('no.such.invalid', 80, 403)):
            for text in (f'CONNECT {host}:{port} HTTP/1.1\nHost: x\n',
                         f'GET http://{host}:{port}/ HTTP/1.1\nHost: 127.0.0.1\n'):
                with self.subTest(text):
                    got, _, body = self.ask(server, text + bob)
                    self.assertEqual(got, status)
                    self.assertNotIn(b'rules', body.replace(b'ruleset', b''))    # not even the file
        eventually(lambda: len(self.lines) == 12)
        self.assertRegex('\n'.join(self.lines),
                         r'127\.0\.0\.1:\d+ bob HTTP GET 127.0.0.1:\d+: done')
        self.assertRegex(''.join(self.lines), r'bob HTTP GET 127\.0\.0\.2:\d+: refused: .*rules:1 ')

    def test_no_other_client_may_reach_what_is_local(self):
        server = self.serve(balancers=BalancerTest.NETWORKS)
        header = socks.ProxyHeader(Address('192.0.2.7', 5), Address('127.0.0.1', 1080)).pack()
        for text in ('CONNECT 127.0.0.1:{0} HTTP/1.1\nHost: x\n\n',
                     'GET http://127.0.0.1:{0}/ HTTP/1.1\n\n',
                     'GET http://localhost:{0}/ HTTP/1.1\n\n'):
            with Peer(server.server_address) as peer:
                peer.send(header + http_bytes(text.format(self.port)))
                self.assertEqual(self.head(peer)[:13], b'HTTP/1.1 403 ')
        eventually(lambda: len(self.lines) == 3)
        self.assertIn('192.0.2.7:5 - HTTP CONNECT 127.0.0.1:', ''.join(self.lines))

    def test_passwords(self):
        users = {'bob': 'secret', '用户': '密码', 'hash': socks.Hashed(hashed_text(b'x'))}
        server = self.serve(users=users, login_delay=0.1)
        texts = ('CONNECT 127.0.0.1:{port} HTTP/1.1\nHost: x\n',
                 'GET http://127.0.0.1:{port}/ HTTP/1.1\n')
        fields = [
            ('', 407), ('Basic Ym9iOnNlY3JldA==', 200), ('basic 55So5oi3OuWvhueggQ==', 200),
            ('Basic aGFzaDp4', 200), ('Basic Ym9iOndyb25n', 407), ('Basic !', 407),
            ('NTLM TlRMTVNTUAABAAAA', 407), ('Negotiate YII=', 407), ('Bearer x', 407),
            ('Basic Og==', 407), ('Basic Ym9i', 407)]
        for text, (given, status) in itertools.product(texts, fields):
            with self.subTest(text, given=given):
                field = f'Proxy-Authorization: {given}\n' if given else ''
                started = time.monotonic()
                got, head, body = self.ask(server, f'{text}{field}\n')
                self.assertEqual(got, status)
                if status == 407:
                    self.assertIn('\r\nProxy-Authenticate: Basic realm=', head)
                else:
                    self.assertNotIn(b'Proxy-Auth', body)
                if 'b25n' in given:         # the time that a wrong one takes with SOCKS
                    self.assertGreater(time.monotonic() - started,
                                       0.9 * server.settings.login_delay)
        self.assertIn(' bob HTTP - -: refused: wrong user name or password', ''.join(self.lines))
        self.assertNotIn('secret', ''.join(self.lines))
        self.assertEqual(server.failures._since['127.0.0.1', b'bob'][1], 2)

    def test_who_needs_no_password(self):
        networks = tuple(map(socks.parse_network, ('127.0.0.0/8',)))
        text = 'GET http://127.0.0.1:{port}/ HTTP/1.1\nProxy-Authorization: Basic Ym9iOndyb25n\n\n'
        for options in ({}, {'users': {'bob': 'secret'}, 'trusted': networks}):
            status, _, body = self.ask(self.serve(**options), text)
            self.assertEqual((status, b'Authorization' in body), (200, False))
        server = self.serve()           # only Kerberos, which HTTP clients cannot have here
        server.settings = server.settings._replace(gssapi=(2,))
        status, _, body = self.ask(server, text)
        self.assertEqual((status, body.decode()),
                         (403, 'refused: HTTP has no GSSAPI here, expected SOCKS5\n'))
        server = self.serve(clients=tuple(map(socks.parse_network, ('192.0.2.0/24',))))
        with Peer(server.server_address) as peer, contextlib.suppress(ConnectionError):
            peer.send(http_bytes(text))
            self.assertEqual(peer.rest(), b'')

    def test_too_many_wrong_passwords(self):
        """They count with those in SOCKS."""
        self.change(socks.Failures, LIMIT=2)
        server = self.serve(users={'bob': 'secret'})
        for given, word in (('Ym9iOndyb25n', 'wrong'), ('Ym9iOndyb25n', 'wrong'),
                            ('Ym9iOnNlY3JldA==', 'too many')):
            status, _, body = self.ask(server, 'GET http://127.0.0.1:{port}/ HTTP/1.1\n'
                                               f'Proxy-Authorization: Basic {given}\n\n')
            self.assertEqual(status, 407)
            self.assertIn(word, body.decode())

    def test_upstream(self):
        """Both kinds of request through another proxy, which is HTTP's or SOCKS'."""
        last = self.serve()
        for scheme in ('http', 'socks5h', 'socks4a'):
            chain = tuple(socks.parse_chain(f'{scheme}://{last.server_address}'))
            first = self.serve(upstream=chain, connect_timeout=1)
            for text, status in (('GET http://localhost:{port}/ HTTP/1.1\n\n', 200),
                                 ('CONNECT localhost:{port} HTTP/1.1\nHost: x\n\n', 200),
                                 ('GET http://127.0.0.1:1/ HTTP/1.1\n\n', 502)):
                with self.subTest(scheme, text=text):
                    self.assertEqual(self.ask(first, text)[0], status)

    def test_inside_of_tls(self):
        server = self.serve(tls=server_context())
        for text in ('CONNECT 127.0.0.1:{0} HTTP/1.1\nHost: x\n\nGET / HTTP/1.1\n\n',
                     'POST http://127.0.0.1:{0}/ HTTP/1.1\nContent-Length: 300000\n\n'
                     + 'a' * 300000 + 'GET http://127.0.0.1:{0}/second HTTP/1.1\n\n'):
            with socket.create_connection(server.server_address) as sock, \
                    client_context().wrap_socket(sock, server_hostname='localhost') as sock:
                sock.sendall(http_bytes(text.format(self.port)))
                near = Peer(sock)
                head = self.head(near)
                self.assertIn(b' 200 ', head)
                if text[0] == 'P':
                    self.assertIn(b'Connection: close', head)
                    self.assertEqual(near.rest().count(b'HTTP/1.1'), 1)
                else:
                    self.assertIn(b' 200 OK', self.head(near))

    def test_a_gate(self):
        """Rules that allow one name let nothing else out, whatever the client says."""
        look_up = socket.getaddrinfo
        names = {'good.example': '127.0.0.1', 'rebound.good.example': '127.0.0.2',
                 'evil.example': '127.0.0.1'}

        def getaddrinfo(host, *args, **options):
            host = host.decode() if isinstance(host, bytes) else host
            return look_up(names.get(host.rstrip('.'), host), *args, **options)

        self.change(socket, getaddrinfo=getaddrinfo)
        server = self.serve(rules=self.rules(
            'deny to 127.0.0.2 ::1\n'
            f'allow connect to good.example rebound.good.example {self.port}\n'
            'deny to *\n'))
        self.assertEqual(self.ask(server, 'GET http://good.example:{port}/ HTTP/1.1\n\n')[0], 200)
        self.assertEqual(self.ask(server, 'CONNECT GOOD.example.:{port} HTTP/1.1\n\n')[0], 200)
        eventually(lambda: len(self.origin_seen.peers) == 2)
        served = 2
        for host in ('127.0.0.1', '127.1', '2130706433', '0x7f000001', '0177.0.0.1', '127.0.0.1.',
                     '[::1]', '[::ffff:127.0.0.1]', '[::127.0.0.1]', '[64:ff9b::127.0.0.1]', '0',
                     '0.0.0.0',
                     '[::]', 'localhost', 'evil.example', 'rebound.good.example',
                     'good.example.evil.example',
                     'good.example@evil.example', 'good.example:80@127.0.0.1', 'xgood.example',
                     'good.example%2eevil.example', 'good.example\\@127.0.0.1',
                     '127.0.0.1#good.example',
                     '127.0.0.1?good.example', '127。0。0。1', 'ⓖood.example.evil.example'):
            for text in (f'GET http://{host}:{{port}}/ HTTP/1.1\nHost: good.example\n\n',
                         f'CONNECT {host}:{{port}} HTTP/1.1\nHost: good.example\n\n',
                         f'GET {host}:{{port}} HTTP/1.1\nHost: good.example\n\n'):
                with self.subTest(text):
                    self.assertIn(self.ask(server, text)[0], (400, 403, 502))
            with self.subTest(host), Peer(server.server_address) as peer:
                peer.ask(Greeting(b'\0'), Choice)
                name = host.strip('[]').encode()
                peer.send(b'\5\1\0\3%c%b' % (len(name), name) + self.port.to_bytes(2, 'big'))
                self.assertNotEqual(peer.read(2), b'\5\0')
        _, _, body = self.ask(server, 'GET http://good.example:{port}/ HTTP/1.1\n'
                                      'Host: evil.example\nConnection: host\n\n')
        self.assertIn(b'\r\nHost: good.example:', body)
        self.assertEqual(len(self.origin_seen.peers), served + 1)

    def test_a_gate_for_other_commands(self):
        server = self.serve(rules=self.rules('allow connect to localhost\ndeny to *\n'))
        for command in (2, 3, 0xF0, 0xF1):
            with Peer(server.server_address) as peer:
                reply = peer.request(command, Address('127.0.0.1', self.port))
                self.assertNotEqual(reply.reply, 0)

    def test_own_client(self):
        server = self.serve(users={'bob': 'secret'})
        for address in (('localhost', self.port), ('127.0.0.1', self.port), ('::1', self.port)):
            if self.lacking in address:
                continue
            url = f'http://bob:secret@{server.server_address}'
            with socks.create_connection(address, PATIENCE, proxy=url) as sock:
                sock.sendall(HTTP)
                self.assertEqual(sock.recv(15), b'HTTP/1.1 200 OK')
        with self.assertRaisesRegex(socks.HTTPError, '407: Proxy Authentication Required'):
            socks.create_connection(('127.0.0.1', 1), proxy=f'http://{server.server_address}')

    def test_no_second_request_gets_out(self):
        """Of mutated requests, each with another behind it, over a connection."""
        chance, seen = random.Random(5), []
        origin = self.origin(lambda peer: seen.append(peer.rest()))
        server = self.serve(handshake_timeout=1)
        seeds = [http_bytes(f'{text}\n').replace(b'http://h', b'http://127.0.0.1:%d' % origin.port)
                 for _, text, _ in FORWARDED]
        for _ in range(int(os.environ.get('REQUESTS', 300))):
            data = mutated(chance, chance.choice(seeds))
            with Peer(server.server_address) as peer, contextlib.suppress(ConnectionError):
                peer.send(data + http_bytes('GET http://evil/second HTTP/1.1\nHost: evil\n\n'))
                peer.finish()
                peer.rest()
        eventually(lambda: not server.clients)
        self.assertTrue(seen)
        for data in seen:
            head, _, body = data.partition(b'\r\n\r\n')
            self.assertNotRegex(head.partition(b'\n')[2], rb'(?m)^[A-Z]+ [^\r]* HTTP/')
            length = re.search(b'(?i)\r\ncontent-length: ([0-9]+)', head)
            is_chunked = re.search(b'(?i)\r\ntransfer-encoding:', head)
            if not is_chunked:
                self.assertLessEqual(len(body), int(length.group(1)) if length else 0, data)
            self.assertLessEqual(len(re.findall(b'(?i)\r\nhost:', head)), 1)
        self.assertGreater(len(seen), 10)


@unittest.skipUnless(hasattr(socket, 'AF_UNIX'), 'no unix sockets here')
class UnixTest(FileCase):
    """A server on a unix socket."""

    def setUp(self):
        super().setUp()
        self.path = self.write('x', '')[:-1] + 'a socket'

    def listen(self, **settings):
        """A server on it, running."""
        handler = logging.Handler()
        self.lines = []
        handler.emit = lambda record: self.lines.append(record.getMessage())
        socks.log.addHandler(handler)
        self.addCleanup(socks.log.removeHandler, handler)
        return self.enter(socks.Server((f'unix:{self.path}', 0), Settings(**settings)).start())

    def client(self):
        sock = self.enter(socket.socket(socket.AF_UNIX))
        sock.settimeout(PATIENCE)
        sock.connect(self.path)
        return UnixPeer(sock)

    def account(self):
        """As the server names the account of this process."""
        if not hasattr(socket, 'SO_PEERCRED'):
            return '-'
        try:
            return pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            return str(os.geteuid())

    def test_connect(self):
        """For SOCKS and HTTP, and with our own client."""
        origin = self.origin(echo)
        self.listen()
        near = self.client()
        self.assertEqual(near.connect('127.0.0.1', origin.port).reply, 0)
        self.exchange_little(near)
        near = self.client()
        near.send(http_bytes(f'CONNECT 127.0.0.1:{origin.port} HTTP/1.1\nHost: x\n\n'))
        self.assertEqual(near.read(12), b'HTTP/1.1 200')
        near.read(27)
        self.exchange_little(near)
        for scheme in ('socks5h', 'socks4a', 'http'):
            url = f'{scheme}+unix://{self.path.replace(" ", "%20")}'
            with socks.create_connection(('127.0.0.1', origin.port), PATIENCE, proxy=url) as sock:
                sock.sendall(b'hello')
                self.assertEqual(sock.recv(5, socket.MSG_WAITALL), b'hello')
        eventually(lambda: len(self.lines) == 5)
        self.assertRegex(self.lines[0],
                         f"^unix:'?{self.path}'? {self.account()} SOCKS5 CONNECT 127")

    def exchange_little(self, near):
        near.send(b'hello')
        near.finish()
        self.assertEqual(near.rest(), b'hello')
        near.sock.close()

    def test_bind_and_datagrams(self):
        """Their addresses are on loopback."""
        target = self.enter(Echo())
        self.listen()
        near = self.client()
        reply, address = near.request(3, Address('0.0.0.0', 0))
        self.assertEqual((reply, address.host), (0, '127.0.0.1'))
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            sock.sendto(Datagram(Address(*target.address), b'x').pack(), address)
            self.assertEqual(Datagram.unpack(sock.recv(100)).payload, b'E:x')
        near = self.client()
        reply, address = near.request(2, Address('127.0.0.1', 0))
        self.assertEqual((reply, address.host), (0, '127.0.0.1'))
        with self.peer(address):
            self.assertEqual(Response.unpack(near.read).reply, 0)

    def test_permissions(self):
        for umask, mode, expected in ((0, None, 0o600), (0o022, None, 0o600), (0o277, None, 0o400),
                                      (0o022, 0o666, 0o666), (0o077, 0o660, 0o660)):
            before = os.umask(umask)
            try:
                with socks.Server((f'unix:{self.path}', 0), Settings(unix_mode=mode)):
                    self.assertEqual(os.stat(self.path).st_mode & 0o777, expected)
                self.assertEqual(os.umask(umask), umask)
            finally:
                os.umask(before)

    def test_the_file(self):
        """A stale one is replaced, another stays; ours goes at the end, another stays."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path)
        with socks.Server((f'unix:{self.path}', 0)):
            with self.assertRaisesRegex(OSError, f'cannot listen on unix:{self.path}: Address'):
                socks.Server((f'unix:{self.path}', 0))
            self.client().sock.close()          # it is still there
        self.assertFalse(os.path.exists(self.path))
        for what in (lambda: open(self.path, 'w').close(), lambda: os.mkdir(self.path)):
            what()
            with self.assertRaisesRegex(OSError, 'cannot listen on unix:'):
                socks.Server((f'unix:{self.path}', 0))
            os.unlink(self.path) if os.path.isfile(self.path) else os.rmdir(self.path)
        for path in ('a' * 200, self.path + '/x', os.path.join(self.folder, 'no', 'x')):
            with self.assertRaisesRegex(OSError, 'cannot listen on unix:'):
                socks.Server((f'unix:{path}', 0))
        with socks.Server((f'unix:{self.path}', 0)):
            os.unlink(self.path)
            open(self.path, 'w').close()
        self.assertTrue(os.path.exists(self.path))
        os.unlink(self.path)
        with self.assertRaisesRegex(ValueError, 'would serve everybody'):
            socks.Server([(f'unix:{self.path}', 0), ('0.0.0.0', 0)])
        self.assertFalse(os.path.exists(self.path))

    def test_passwords(self):
        """Users are asked for theirs, as on loopback; whom we trust is the account's name."""
        self.listen(users={'bob': 'secret'})
        near = self.client()
        self.assertEqual(near.ask(Greeting(b'\0'), Choice), Choice(255))
        near = self.client()
        near.ask(Greeting(b'\2'), Choice)
        self.assertEqual(near.ask(Credentials(b'bob', b'secret'), Verdict), Verdict(0))

    @unittest.skipUnless(hasattr(socket, 'SO_PEERCRED'), 'the system does not tell accounts')
    def test_rules(self):
        """The account is the user, and the client is on this host."""
        origin, account = self.origin(echo), self.account()
        self.listen(users={'bob': 'secret'}, trusted=(socks.parse_network('127.0.0.1/32'),),
                    ident=True, rules=self.rules(
                        f'allow user {account} from 127.0.0.0/8 to 127.0.0.1\n'
                        'allow user eve to *'))
        near = self.client()
        self.assertEqual(near.connect('127.0.0.1', origin.port).reply, 0)
        near.sock.close()
        self.assertEqual(self.client().connect('127.0.0.2', origin.port).reply, Reply.NOT_ALLOWED)
        for host, code in ('127.0.0.1', 0x5a), ('127.0.0.2', 0x5b):
            near = self.client()        # a name that SOCKS4 claims changes nothing
            near.send(Request4(1, Address(host, origin.port), b'eve').pack())
            self.assertEqual(Response4.unpack(near.read).code, code)
            near.sock.close()

    def test_balancer(self):
        """The one behind a balancer is not the balancer's account, nor on this host."""
        self.listen(balancers=BalancerTest.NETWORKS)
        for source, reply, user in (('192.0.2.7', Reply.NOT_ALLOWED, '-'),
                                    ('127.0.0.9', Reply.CONNECTION_REFUSED, '-')):
            near = self.client()
            near.send(socks.ProxyHeader(Address(source, 5), Address('192.0.2.1', 1080)).pack())
            self.assertEqual(near.connect('127.0.0.1', self.refused_port()).reply, reply)
            near.sock.close()
            eventually(lambda: f'{source}:5 {user} SOCKS5' in ''.join(self.lines))

    def test_programs(self):
        """With one process or several, the file is there while it serves, and no longer."""
        for workers in ('1', '2'):
            for number in (signal.SIGTERM, signal.SIGINT):
                with Program('-w', workers, '-b', '127.0.0.1', '-b', f'unix:{self.path}',
                             '--unix-mode', '640') as program:
                    self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o640)
                    near = self.client()
                    self.assertEqual(near.ask(Greeting(b'\0'), Choice), Choice(0))
                    near.sock.close()
                    self.assertEqual(program.stop(number), 0)
                self.assertFalse(os.path.exists(self.path))
                self.assertRegex(program.log, f"listening on unix:'?{self.path}")

    def test_of_systemd(self):
        """Its file is not ours."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path)
            sock.listen(1)
            os.chmod(self.path, 0o777)
            code = ('import os, sys; os.dup2(int(sys.argv.pop(1)), 3);'
                    'os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1");'
                    'os.execv(sys.executable, [sys.executable, *sys.argv[1:]])')
            process = subprocess.Popen(
                [sys.executable, '-c', code, str(sock.fileno()), *socks_py()[1:]],
                pass_fds=[sock.fileno()], stderr=subprocess.DEVNULL)
            near = self.client()
            self.assertEqual(near.ask(Greeting(b'\0'), Choice), Choice(0))
            near.sock.close()
            process.terminate()
            self.assertEqual(process.wait(PATIENCE), 0)
        self.assertTrue(os.path.exists(self.path))


class UnixPeer(Peer):

    def __init__(self, sock):
        self.sock = sock


class Kerberos:
    """A KDC that knows the user alice and the services rcmd and socks of localhost; while it runs,
    the environment leads to it, to a ticket of alice and to the services' keys."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        folder, port = self._folder.name, unused_port()
        for name, text in (('krb5.conf', KRB5_CONF % port),
                           ('kdc.conf', KDC_CONF % ((port, port) + (folder,) * 4))):
            with open(os.path.join(folder, name), 'w') as file:
                file.write(text)
        self._environment = dict(os.environ)
        os.environ.update(
            PATH=SBIN, KRB5_CONFIG=self.path('krb5.conf'), KRB5_KDC_PROFILE=self.path('kdc.conf'),
            KRB5CCNAME='FILE:' + self.path('tickets'), KRB5_KTNAME=self.path('services.keytab'),
            KRB5RCACHENAME='file2:' + self.path('replays'))
        self._run('kdb5_util', '-r', 'SOCKS.TEST', '-P', 'master', 'create', '-s')
        for command in ('addprinc -randkey alice', 'addprinc -randkey rcmd/localhost',
                        'addprinc -randkey socks/localhost',
                        f'ktadd -k {self.path("services.keytab")} rcmd/localhost socks/localhost',
                        f'ktadd -k {self.path("alice.keytab")} alice'):
            self._run('kadmin.local', '-r', 'SOCKS.TEST', '-p', 'admin/admin', '-q', command)
        self._process = subprocess.Popen(
            ['krb5kdc', '-r', 'SOCKS.TEST', '-n', '-P', self.path('pid')],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(lambda: self.is_up(port))
        self.log_in()
        self.log_in('-l', '1', '-c', 'FILE:' + self.path('short'))
        self.expires = time.monotonic() + 2.1

    @staticmethod
    def is_up(port):
        with contextlib.suppress(OSError), Peer(('127.0.0.1', port)):
            return True

    @staticmethod
    def _run(*command):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise AssertionError(done.stdout)

    def path(self, name):
        return os.path.join(self._folder.name, name)

    def log_in(self, *options):
        self._run('kinit', '-k', '-t', self.path('alice.keytab'), *options, 'alice')

    def close(self):
        self._process.terminate()
        self._process.wait()
        os.environ.clear()
        os.environ.update(self._environment)
        self._folder.cleanup()


class GssAssociate(StreamAssociate):
    """A client with an association whose datagrams travel in its connection, inside of GSSAPI."""

    def __init__(self, peer, context):
        self.control, self.context, self.data = self, context, b''
        self.peer, self.sock = peer, peer.sock
        peer.send(context.seal(hexed('05050001 00000000 0000')))
        self.response = Response.unpack(self.read)

    def send(self, data):
        for piece in pieces(self.message(data), 30000):
            self.peer.send(self.context.seal(piece))

    def read(self, n):
        while len(self.data) < n:
            token = GssMessage.unpack_token(3, self.peer.read)
            self.data += self.context.open(token, self.context.OUT_OF_ORDER)
        data, self.data = self.data[:n], self.data[n:]
        return data


def has_kerberos():
    with contextlib.suppress(OSError):
        socks.gss_library()
        return all(shutil.which(program, path=SBIN)
                   for program in ('krb5kdc', 'kdb5_util', 'kadmin.local', 'kinit'))
    return False


def changed(message):
    """The same but for one bit; a byte that is set to some value may have it already."""
    return message[:-1] + bytes((message[-1] ^ 1,))


@unittest.skipUnless(has_kerberos(), 'not installed: krb5-kdc, krb5-admin-server, krb5-user')
class GssapiTest(ClientCase, FileCase, DatagramCase):
    BOTH = 1, 2

    @classmethod
    def setUpClass(cls):
        cls.kerberos = Kerberos()

    @classmethod
    def tearDownClass(cls):
        cls.kerberos.close()

    def environment(self, **variables):
        """Other variables up to the end of the test."""
        for name, value in variables.items():
            self.addCleanup(os.environ.__setitem__, name, os.environ[name])
            os.environ[name] = value

    def establish(self, server, in_sequence=True):
        """A connection by which we are known as alice, and its context."""
        peer, context = self.peer(server.server_address), socks.GssContext(
            'rcmd@localhost', in_sequence)
        self.assertEqual(peer.ask(Greeting(b'\1'), Choice).method, 1)
        token, complete = context.step()
        while not complete:
            answer = peer.ask(GssMessage(1, token), GssMessage)
            self.assertEqual(answer.kind, 1)
            token, complete = context.step(answer.token)
        self.assertEqual(token, b'')
        return peer, context

    def tls(self):
        return socks.tls_context(self.write('cert', CERTIFICATE), self.write('key', KEY))

    def agree(self, server, level, in_sequence=True):
        """The same, with a level agreed on."""
        peer, context = self.establish(server, in_sequence)
        answer = peer.ask(GssMessage(2, context.wrap(bytes((level,)), False)), GssMessage)
        self.assertEqual(answer.kind, 2)
        self.assertEqual(len(answer.token), 29)         # G-06
        context.level = context.unwrap(answer.token)[0][0]
        return peer, context

    def request(self, context, port, command=1):
        return Request(command, Address('127.0.0.1', port)).pack()

    def answered(self, peer, context, size=0):
        """What the next message protects, or the next ones, up to so many bytes."""
        data = context.open(GssMessage.unpack_token(3, peer.read), context.OUT_OF_ORDER)
        more = size - len(data)
        return data + self.answered(peer, context, more) if more > 0 else data

    def proxy(self, server, user=''):
        return f'socks5h+gssapi://{user}localhost:{server.server_address[1]}'

    def connect(self, server, port, user=''):
        return self.enter(socks.create_connection(
            ('127.0.0.1', port), PATIENCE, proxy=self.proxy(server, user)))

    def test_optimistic(self):
        """The first data goes along with the request, behind the authentication."""
        self.addCleanup(socks.Flight.known.clear)
        origin, server = self.origin(echo), self.serve(gssapi=self.BOTH)
        url = self.proxy(server) + '?optimistic=1'
        for _ in range(2):
            with socks.create_connection(('127.0.0.1', origin.port), PATIENCE, proxy=[url, url],
                                         data=b'data') as sock:
                self.assertEqual(Peer(sock).read(4), b'data')
        self.assertEqual(set(socks.Flight.known.values()), {0})

    def test_levels(self):
        """What is asked for, what may be chosen, what is agreed on; and what it looks like."""
        origin = self.origin(echo)
        for wanted, allowed, agreed in (
                (1, self.BOTH, 1), (2, self.BOTH, 2), (3, self.BOTH, 2), (0, self.BOTH, 2),
                (9, self.BOTH, 2), (2, (1,), 1), (1, (2,), 2), (0, (0, 1, 2), 0), (0, (0,), 0)):
            with self.subTest(wanted=wanted, allowed=allowed):
                server = self.serve(gssapi=allowed)
                peer, context = self.agree(server, wanted)
                self.assertEqual(context.level, agreed)
                request = self.request(context, origin.port)
                if agreed:                              # G-08, G-09
                    frame = context.seal(request)
                    self.assertEqual(frame[:4].hex(), {1: '01030026', 2: '01030046'}[agreed])
                    peer.send(frame, 1)                 # split in any way
                    reply = self.answered(peer, context)
                    peer.send(context.seal(b'twi') + context.seal(b'') + context.seal(b'ce'))
                    data = self.answered(peer, context, 5)
                else:                                   # G-12
                    peer.send(request)
                    reply = peer.read(10)
                    peer.send(b'twice')
                    data = peer.read(5)
                self.assertEqual((reply[:4], data), (b'\5\0\0\1', b'twice'))
                peer.finish()
                self.assertEqual(peer.rest(), b'')
                line = self.line()
                self.assertIn(' alice@SOCKS.TEST SOCKS5 CONNECT ', line)
                self.assertIn(': done, 5 bytes up, 5 down', line)

    def test_datagrams_in_tcp(self):
        """They are protected as all else there."""
        for level in self.BOTH:
            peer, context = self.agree(self.serve(gssapi=self.BOTH), level)
            self.check_way(GssAssociate(peer, context))

    def test_datagrams_by_another_proxy(self):
        last = self.serve(gssapi=self.BOTH)
        for upstream in (self.proxy(last), [f'http://{last.server_address}', self.proxy(last)]):
            if isinstance(upstream, list):
                first = self.enter(socks.Server(('127.0.0.1', 0)).start())
                upstream[0] = f'http://{first.server_address}'
            server = self.enter(socks.Server(('127.0.0.1', 0), Settings(upstream=upstream)).start())
            self.check_way(self.associate(server), largest=60000)

    def test_unprotected_level(self):
        """NEC's: G-07."""
        origin = self.origin(echo)
        peer, context = self.establish(self.serve(gssapi=self.BOTH, gssapi_nec=True))
        self.assertEqual(peer.ask(GssMessage(2, b'\2'), GssMessage), (2, b'\2'))
        peer.send(context.seal(self.request(context, origin.port)))
        self.assertEqual(self.answered(peer, context)[:2], b'\5\0')
        peer, context = self.establish(self.serve(gssapi=self.BOTH))    # not allowed
        peer.send(GssMessage(2, b'\2').pack())
        self.assertEqual(peer.rest(), b'\1\xff')

    def test_wrong_messages(self):
        for vector in ('0101000767617262616765',        # G-03, garbage
                       '01010000',                      # G-04, nothing
                       '0102000101',                    # G-05, a level before the context
                       '01030001 00', '01ff', '0501 00', '0001 0001 00', '0101ffff 00*65535'):
            with self.subTest(vector):
                server = self.serve(gssapi=self.BOTH)
                peer = self.peer(server.server_address)
                self.assertEqual(peer.ask(Greeting(b'\1'), Choice).method, 1)
                peer.send(hexed(vector))
                self.assertEqual(peer.rest(), b'\1\xff')
                peer.finish()
                self.assertIn('refused: ', self.line())

    def test_wrong_levels(self):
        server = self.serve(gssapi=self.BOTH)
        for level in b'', b'\1\2':
            peer, context = self.establish(server)
            peer.send(GssMessage(2, context.wrap(level, False)).pack())
            self.assertEqual(peer.rest(), b'\1\xff')

    def test_wrong_requests(self):
        """In the clear (G-10), changed, not encrypted, twice: none of it is answered."""
        origin = self.origin(echo)
        for make in (lambda context, request: request,
                     lambda context, request: changed(context.seal(request)),
                     lambda context, request: GssMessage(3, context.wrap(request, False)).pack(),
                     lambda context, request: GssMessage(2, context.wrap(request, True)).pack(),
                     lambda context, request: b'\1\xff'):
            server = self.serve(gssapi=self.BOTH)
            peer, context = self.agree(server, 2)
            peer.send(make(context, self.request(context, origin.port)))
            self.assertEqual(self.rest_or_reset(peer), b'')
            self.assertIn('no request: GSSAPI', self.line())
        self.assertFalse(origin.peers)

    def rest_or_reset(self, peer):
        with contextlib.suppress(ConnectionResetError):
            return peer.rest()
        return b''

    def test_wrong_data(self):
        """Changed, twice, out of order, in the clear: the tunnel ends, and nothing of it is sent
        on."""
        for case in 'changed', 'twice', 'out of order', 'clear', 'half':
            with self.subTest(case):
                origin, server = self.origin(), self.serve(gssapi=self.BOTH)
                peer, context = self.agree(server, 2)
                peer.send(context.seal(self.request(context, origin.port)))
                self.answered(peer, context)
                far = origin.take()
                first, second = context.seal(b'first'), context.seal(b'second')
                peer.send(first)
                self.assertEqual(far.read(5), b'first')
                peer.send({'changed': changed(second), 'twice': first, 'clear': b'second',
                           'out of order': context.seal(b'third'), 'half': second[:9]}[case])
                if case == 'half':
                    peer.finish()
                self.assertEqual(self.rest_or_reset(far), b'')
                self.assertEqual(self.rest_or_reset(peer), b'')
                self.assertNotIn('done', self.line())

    def test_bulk_both_ways_and_half_close(self):
        for level in self.BOTH:
            with self.subTest(level=level):
                server, origin = self.serve(gssapi=(level,)), self.origin()
                near = Peer(self.connect(server, origin.port))
                far = origin.take()
                self.exchange(near, far, 16 << 20)
                self.assertRegex(self.line(),
                                 r': done, 167\d{5} bytes up, 167\d{5} down')

    def test_inside_of_tls_and_in_a_chain(self):
        origin, inner = self.origin(echo), self.serve(gssapi=self.BOTH, tls=self.tls())
        outer = self.serve(gssapi=self.BOTH)
        chain = [self.proxy(outer), self.proxy(inner).replace('+', '+tls+', 1)]
        with socks.create_connection(('localhost', origin.port), PATIENCE, proxy=chain,
                                     ssl_context=client_context()) as sock:
            self.check_echo(sock)
        last = self.serve(upstream=tuple(socks.parse_chain(self.proxy(outer))))
        with socks.create_connection(('localhost', origin.port), PATIENCE,
                                     proxy=self.url(last)) as sock:
            self.check_echo(sock)

    def test_datagrams(self):
        """As the client half sends them, and G-11."""
        target = self.enter(Echo())
        for level, hops in itertools.product(self.BOTH, (1, 2)):    # beside the connection, inside
            chain = [self.proxy(self.serve(gssapi=(level,)))] * hops
            with self.subTest(level=level, hops=hops), \
                    socks.socksocket(type=socket.SOCK_DGRAM, proxy=chain) as sock:
                sock.settimeout(PATIENCE)
                for payload in b'abc', b'', b'x' * 9000:
                    self.check_datagram(sock, payload, target)

    def test_large_datagrams(self):
        """What does not fit in with its protection is an error here, and dropped there."""
        target = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        target.bind(('127.0.0.1', 0))
        target.settimeout(PATIENCE)
        server = self.serve(gssapi=self.BOTH)
        with socks.socksocket(type=socket.SOCK_DGRAM, proxy=self.proxy(server)) as sock:
            sock.settimeout(PATIENCE)
            with self.assertRaises(OSError) as caught:
                sock.sendto(bytes(65480), target.getsockname())
            self.assertEqual(caught.exception.errno, errno.EMSGSIZE)
            sock.sendto(b'abc', target.getsockname())
            _, relay = target.recvfrom(9)
            target.sendto(bytes(65500), relay)
            target.sendto(b'def', relay)
            self.assertEqual(sock.recv(65536), b'def')

    def test_datagrams_that_are_peeked_at(self):
        target, server = self.enter(Echo()), self.serve(gssapi=self.BOTH)
        with socks.socksocket(type=socket.SOCK_DGRAM, proxy=self.proxy(server)) as sock:
            sock.settimeout(PATIENCE)
            for payload in b'abc', b'def':
                sock.sendto(payload, target.address)
                for flags in socket.MSG_PEEK, socket.MSG_PEEK, 0:
                    self.assertEqual(sock.recv(100, flags), b'E:' + payload)

    def test_replays_must_be_noticed(self):
        server = self.serve(gssapi=self.BOTH)
        context, library = socks.GssContext('rcmd@localhost'), socks.GssLibrary()
        library.REPLAY, library.SEQUENCE = 0, 0
        context._library = library
        peer = self.peer(server.server_address)
        self.assertEqual(peer.ask(Greeting(b'\1'), Choice).method, 1)
        peer.send(GssMessage(1, context.step()[0]).pack())
        self.assertEqual(peer.rest(), b'\1\xff')
        peer.finish()
        self.assertIn('replay detection', self.line())

    def test_the_end_below_a_layer(self):
        """TLS that could not say its end at once does so before GSSAPI's connection is done."""
        tls, reader = self.tls_pair()
        layer = socks.GssLayer(tls, self.agree(self.serve(gssapi=(2,)), 2)[1])
        with contextlib.suppress(BlockingIOError):
            while True:
                tls.send(b'x' * 100)
        layer.shutdown(socket.SHUT_WR)
        self.assertTrue(layer.unsent)
        reader.settimeout(PATIENCE)
        with Background(lambda: list(iter(lambda: reader.recv(65536), b''))) as drinking:
            eventually(lambda: layer.flush() and not layer.unsent)
            self.assertTrue(drinking.result())

    def test_replayed_and_foreign_datagrams(self):
        for udp_port in (0, unused_port()):
            with self.subTest(udp_port=udp_port):
                self.check_datagrams(self.serve(gssapi=self.BOTH, udp_port=udp_port))

    def check_datagrams(self, server):
        target = self.enter(Echo())
        peer, context = self.agree(server, 2, in_sequence=False)
        peer.send(context.seal(Request(3, Address('0.0.0.0', 0)).pack()))
        read, _ = socks.reader(self.answered(peer, context))
        relay = Response.unpack(read).address
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            header = Datagram(Address(*target.address), b'').pack()
            first, second = context.seal(header + b'abc'), context.seal(header + b'def')
            self.assertEqual(first[:4].hex(), '01030049')
            sent = [header + b'clear', b'', b'\1', first + b'longer', changed(first), first,
                    first, second]
            for message in sent:
                sock.sendto(message, relay)
            for payload in b'abc', b'def':
                answer = context.unseal(sock.recv(65536))
                self.assertEqual(answer, header + b'E:' + payload)
        peer.finish()
        self.assertIn('6 datagrams dropped', self.line())

    def test_who_is_not_accepted(self):
        origin, server = self.origin(echo), self.serve(gssapi=self.BOTH)
        for user, message in (('nobody@', 'not found'), ('rcmd%2Fnowhere@', 'not found')):
            with self.assertRaisesRegex(socks.SOCKS5AuthError, 'GSSAPI: .*' + message):
                self.connect(server, origin.port, user)
        self.connect(server, origin.port, 'socks@')
        self.connect(server, origin.port, 'rcmd%2Flocalhost@')
        self.environment(KRB5CCNAME='FILE:' + self.kerberos.path('none'))
        with self.assertRaisesRegex(socks.SOCKS5AuthError, 'No Kerberos credentials'):
            self.connect(server, origin.port)
        self.environment(KRB5CCNAME='FILE:' + self.kerberos.path('short'))
        time.sleep(max(0, self.kerberos.expires - time.monotonic()))
        with self.assertRaisesRegex(socks.SOCKS5AuthError, '(?i)expired'):
            self.connect(server, origin.port)
        with self.assertRaisesRegex(socks.SOCKS5AuthError, 'does not accept GSSAPI'):
            self.connect(self.serve(), origin.port)

    def test_a_server_without_keys(self):
        server = self.serve(gssapi=self.BOTH)
        self.environment(KRB5_KTNAME=self.kerberos.path('missing'))
        with self.assertRaisesRegex(OSError, 'GSSAPI: .*Keytab .* is nonexistent'):
            socks.Server(('127.0.0.1', 0), Settings(gssapi=self.BOTH))
        with self.assertRaisesRegex(socks.SOCKS5AuthError, 'rejected the GSSAPI authentication'):
            self.connect(server, self.refused_port())
        self.assertRegex(self.line(),
                         'refused: GSSAPI: .*Keytab .* is nonexistent')

    def test_refusals_are_protected_too(self):
        rules = (socks.Rule(False, ports=((7, 7),)), socks.Rule(True, users=('alice@SOCKS.TEST',)))
        server = self.serve(gssapi=self.BOTH, rules=rules)
        for port, reply in ((7, Reply.NOT_ALLOWED),
                            (self.refused_port(), Reply.CONNECTION_REFUSED)):
            with self.assertRaises(socks.SOCKS5Error) as caught:
                self.connect(server, port)
            self.assertEqual(caught.exception.reply, reply)

    def test_beside_passwords(self):
        """Both are offered; without either, nobody is served."""
        origin = self.origin(echo)
        server = self.serve(gssapi=self.BOTH, users=USERS)
        for proxy in self.proxy(server), self.url(server, user='bob:secret@'):
            with socks.create_connection(('127.0.0.1', origin.port), PATIENCE, proxy=proxy) as sock:
                self.check_echo(sock)
        for server in server, self.serve(gssapi=self.BOTH):
            for method in b'\0', b'':
                peer = self.peer(server.server_address)
                self.assertEqual(peer.ask(Greeting(method), Choice).method, 0xFF)
            peer = self.peer(server.server_address)
            peer.send(Request4(1, Address('127.0.0.1', origin.port)).pack())
            self.assertEqual(Response4.unpack(peer.read).code, 0x5b)

    def test_command_line(self):
        origin, keytab = self.origin(echo), os.environ.pop('KRB5_KTNAME')
        self.addCleanup(os.environ.__setitem__, 'KRB5_KTNAME', keytab)
        with Program('--gssapi', '--keytab', keytab, '-p', '0') as program:
            proxy = f'socks5h+gssapi://localhost:{program.address[1]}'
            with socks.create_connection(('127.0.0.1', origin.port), PATIENCE, proxy=proxy) as sock:
                self.check_echo(sock)


class GssapiOptionsTest(unittest.TestCase):

    def test_only_who_asks_for_it_loads_it(self):
        code = ('import socks, sys; server = socks.Server(("127.0.0.1", 0)); '
                'server.server_close(); sys.exit("ctypes" in sys.modules)')
        self.assertEqual(subprocess.call([sys.executable, '-c', code], cwd=compiled()), 0)

    def test_where_it_is_missing(self):
        class Missing(socks.GssLibrary):
            NAME = 'libnowhere.so'

        with self.assertRaisesRegex(OSError, 'GSSAPI: (libnowhere.so is not|only supported)'):
            Missing()

    def test_urls(self):
        proxy = socks.parse_proxy_url('socks5h+gssapi://socks@proxy')
        self.assertEqual(proxy, (socks.SOCKS5 | socks.GSSAPI, 'proxy', None, True, b'socks', None))
        self.assertEqual(str(proxy), 'SOCKS5+GSSAPI proxy proxy:1080')
        self.assertEqual(str(socks.parse_proxy_url('socks5+tls+gssapi://p')),
                         'SOCKS5+TLS+GSSAPI proxy p:1080')
        self.assertEqual(socks.parse_proxy_url('socks6h://p?udp=tcp').kind, socks.SOCKS6)
        for url in 'socks4+gssapi://p', 'http+gssapi://p':
            with self.assertRaisesRegex(ValueError, 'GSSAPI: expected a proxy of type SOCKS5'):
                socks.parse_proxy_url(url)
        for url in 'socks5+gssapi://a:b@p', 'socks5+gssapi://%ff@p':
            with self.assertRaisesRegex(ValueError, 'expected a service name in UTF-8 and no pass'):
                socks.parse_proxy_url(url)


class UpstreamTest(Case):
    """A server that sends CONNECT through another one."""

    def test_names_are_passed_on(self):
        origin = self.origin(echo)
        last = self.serve()
        first = self.serve(upstream=tuple(socks.parse_chain(f'socks5h://{last.server_address}')))
        self.slow_names()
        peer = self.peer(first.server_address)
        self.assertEqual(peer.connect('localhost', origin.port).reply, 0)
        peer.send(b'hello')
        self.assertEqual(peer.read(5), b'hello')
        self.assertEqual(self.peer(first.server_address).connect(
            '127.0.0.1', self.refused_port()).reply, Reply.CONNECTION_REFUSED)
        peer.sock.close()
        eventually(lambda: any(f'CONNECT localhost:{origin.port}: done' in line
                               for line in self.lines))

    def test_names_are_resolved_there(self):
        """By Tor's extensions, too; what the other proxy answers goes to the client."""
        looked_up = []
        self.names(lambda name, family: looked_up.append(name) or ['192.0.2.7'])
        last = self.serve(tor_extensions=True)
        self.peer(last.server_address).request(socks.Command.RESOLVE, Address('a.test', 0))
        del looked_up[:]                # the other proxy remembers it
        upstream = f'socks5h://{last.server_address}'
        first = self.serve(upstream=upstream, tor_extensions=True)
        for command, asked, found in ((socks.Command.RESOLVE, 'a.test', '192.0.2.7'),
                                      (socks.Command.RESOLVE, '192.0.2.8', '192.0.2.8'),
                                      (socks.Command.RESOLVE_PTR, '127.0.0.1', 'localhost')):
            answer = self.peer(first.server_address).request(command, Address(asked, 0))
            self.assertEqual((answer.reply, answer.address.host.partition('.localdomain')[0]),
                             (0, found))
        without = self.serve(upstream=upstream, tor_extensions=True, rules=['deny to a.test'])
        self.assertEqual(self.peer(without.server_address).request(
            socks.Command.RESOLVE, Address('a.test', 0)).reply, Reply.NOT_ALLOWED)
        plain = self.serve()
        server = self.serve(upstream=f'socks5h://{plain.server_address}', tor_extensions=True)
        self.assertEqual(self.peer(server.server_address).request(
            socks.Command.RESOLVE, Address('a.test', 0)).reply, Reply.COMMAND_NOT_SUPPORTED)
        self.assertEqual(looked_up, [])

    def test_strange_answers_to_look_ups(self):
        """An address for a name, and a name for an address, and nothing that forges a log line."""
        for command, asked, kind, host, found in (
                (socks.Command.RESOLVE, 'a.test', 3, b'ok\n2026 INFO', None),
                (socks.Command.RESOLVE, 'a.test', 3, b'', None),
                (socks.Command.RESOLVE, 'a.test', 3, b'\xff\xfe', None),
                (socks.Command.RESOLVE, 'a.test', 3, b'b.test', None),
                (socks.Command.RESOLVE, 'a.test', 1, bytes(4), None),
                (socks.Command.RESOLVE, 'a.test', 1, b'\1\2\3\4', '1.2.3.4'),
                (socks.Command.RESOLVE, 'a.test', 4, bytes(10) + b'\xff\xff\1\2\3\4', '1.2.3.4'),
                (socks.Command.RESOLVE_PTR, '192.0.2.1', 1, b'\1\2\3\4', None),
                (socks.Command.RESOLVE_PTR, '192.0.2.1', 3, b'a b', None),
                (socks.Command.RESOLVE_PTR, '192.0.2.1', 3, b'B.test.', 'b.test')):
            def proxy(peer):
                peer.read(3)
                peer.send(b'\5\0')
                peer.read(5)
                length = bytes([len(host)]) if kind == 3 else b''
                peer.send(bytes([5, 0, 0, kind]) + length + host + b'\0\0')

            upstream = f'socks5h://127.0.0.1:{self.origin(proxy).port}'
            with self.subTest(asked, host=host):
                server = self.serve(upstream=upstream, tor_extensions=True)
                answer = self.peer(server.server_address).request(command, Address(asked, 0))
                self.assertEqual((answer.reply, answer.address.host),
                                 (0, found) if found else (Reply.GENERAL_FAILURE, '0.0.0.0'))
                self.assertNotIn('\n', self.line())

    def test_look_ups_go_the_way_of_connections(self):
        """A name that rules on networks concern is looked up here, as for CONNECT."""
        self.names(lambda name, family: ['127.0.0.1'])
        last = self.serve(tor_extensions=True)
        for rules, reply in ((['allow to 10.0.0.0/8 via direct', 'deny to *'], Reply.NOT_ALLOWED),
                             (['allow to 127.0.0.0/8 via direct'], 0),
                             (['allow to *'], 0),
                             (['allow to b.test via direct', 'allow to *'], 0)):
            with self.subTest(rules):
                server = self.serve(upstream=f'socks5h://{last.server_address}', rules=rules,
                                    tor_extensions=True)
                self.assertEqual(self.peer(server.server_address).request(
                    socks.Command.RESOLVE, Address('a.test', 0)).reply, reply)

    def test_strange_bnd(self):
        """What the other proxy says it is bound to: the client gets an IP address, or zeros."""
        for name in b'fe80::1%\xff', b'fe80::1%eth0', b'x.test', b'\0':
            def proxy(peer):
                peer.read(3)
                peer.send(b'\5\0')
                peer.read(10)
                peer.send(b'\5\0\0\3%c%b\0\x50' % (len(name), name))

            server = self.serve(upstream=f'socks5h://127.0.0.1:{self.origin(proxy).port}')
            self.assertEqual(self.peer(server.server_address).connect('192.0.2.1', 80),
                             Response(0, socks.UNSPECIFIED))

    def test_rules(self):
        """Names are not looked up here, so that only rules on names concern them."""
        origin, last = self.origin(echo), self.serve()
        upstream = tuple(socks.parse_chain(f'socks5h://{last.server_address}'))
        for text, host, reply in (
                ('allow to 127.0.0.0/8', '127.0.0.1', 0), ('allow to 127.0.0.0/8', 'localhost', 2),
                ('allow to localhost', 'localhost', 0), ('allow to *', 'localhost', 0),
                ('deny to 127.0.0.0/8\nallow to *', '127.1', 2),
                ('deny to 127.0.0.0/8\nallow to *', '2130706433', 2)):
            rules = tuple(socks.parse_rule(line, 'rule') for line in text.splitlines())
            server = self.serve(upstream=upstream, rules=rules)
            with self.subTest(text, host=host), Peer(server.server_address) as peer:
                self.assertEqual(peer.connect(host, origin.port).reply, reply)

    def through(self, url, host, port, remote=False, **settings):
        """The reply to a CONNECT through a server that uses the proxy at `url`; for a client that
        seems to be on another host, if it is to be remote."""
        loopback = (ipaddress.ip_network('127.0.0.0/8'),)
        server = self.serve(upstream=tuple(socks.parse_chain(url)), balancers=loopback * remote,
                            **settings)
        with Peer(server.server_address) as peer:
            if remote:
                peer.send(socks.ProxyHeader(
                    Address('192.0.2.1', 1), Address('192.0.2.2', 2)).pack())
            return peer.connect(host, port).reply

    def test_what_we_resolve_is_judged(self):
        """Each address, as without the other proxy; and it is asked for one that was."""
        addresses = {'mine.test': ['127.0.0.1'], 'both.test': ['192.0.2.7', '127.0.0.1'],
                     'some.test': ['192.0.2.8', '127.0.0.1']}
        self.names(lambda name, _: addresses.get(name))
        origin, last = self.origin(echo), self.serve()
        for scheme in 'socks5', 'socks4':
            url = f'{scheme}://{last.server_address}'
            for host, rules, remote, reply in (
                    ('mine.test', None, False, 0), ('mine.test', None, True, 2),
                    ('localhost', None, True, 2), ('127.0.0.1', None, True, 2),
                    ('mine.test', 'deny to 127.0.0.0/8|allow to *', False, 2),
                    ('mine.test', 'allow to 127.0.0.0/8', False, 0),
                    ('mine.test', 'allow to 127.0.0.0/8', True, 0),
                    ('both.test', 'deny to 192.0.2.0/24|allow to *', False, 0),
                    ('both.test', 'deny to both.test|allow to *', False, 2)):
                settings = {'rules': tuple(socks.parse_rule(line, 'rule')
                                           for line in rules.split('|'))} if rules else {}
                with self.subTest(scheme, host=host, rules=rules, remote=remote):
                    self.assertEqual(
                        self.through(url, host, origin.port, remote, **settings), reply)

    def test_the_next_address(self):
        """If the other proxy cannot reach one, it is asked for the next, but not for all."""
        hosts = ['::1', '127.0.0.2', '127.0.0.1']
        self.names(lambda name, _: hosts if name == 'a.test' else
                   ['127.0.0.%d' % number for number in range(9, 0, -1)])
        last, origin = self.serve(), self.origin(echo)
        for kind in socks.HTTP, socks.SOCKS5, socks.SOCKS4:
            url = (kind, *last.server_address, False)
            self.assertEqual(self.through(url, 'a.test', origin.port), 0)
        self.assertNotEqual(self.through(url, 'b.test', origin.port), 0)
        scripted = self.enter(Scripted(
            ['', crlf('HTTP/1.1 407 Proxy Authentication Required\n\n')], last=leave))
        self.through((socks.HTTP, '127.0.0.1', scripted.port, False), 'a.test', origin.port)
        self.assertEqual(len(scripted.accepted), 1)     # a wrong password stays wrong
        self.assertEqual(self.through(f'socks5://{last.server_address}', 'a.test',
                                      self.refused_port()), Reply.CONNECTION_REFUSED)

    def test_names_of_the_other_proxy_itself(self):
        """They are as local to it as its loopback addresses, as far as we know them."""
        origin, last = self.origin(echo), self.serve()
        for scheme in 'socks5h', 'socks4a':
            url = f'{scheme}://{last.server_address}'
            for host in ('localhost', 'LocalHost.', 'a.localhost', 'localhost.localdomain',
                         'ip6-localhost', 'localhost4'):
                with self.subTest(scheme, host=host):
                    self.assertEqual(self.through(url, host, origin.port, True), 2)
            self.assertEqual(self.through(url, 'localhost', origin.port, False), 0)
            rules = tuple(socks.parse_rule(line, 'rule') for line in (
                'deny to 127.0.0.0/8 ::1', 'allow to *'))
            self.assertEqual(self.through(url, 'localhost', origin.port, False, rules=rules), 2)

    def test_names_as_they_are_passed_on(self):
        """With the final dot, and only what every proxy takes for the same name."""
        for scheme, host, expected in (
                ('socks5h', 'a.test.', '0501000307 612e746573742e 0050'),
                ('socks5h', 'A.test', '0501000306 612e74657374 0050'),
                ('socks5h', '127.1.', '05010001 7f000001 0050')):
            scripted = self.enter(Scripted(['050100', '0500', expected, OK5]))
            with self.subTest(host):
                url = f'{scheme}://127.0.0.1:{scripted.port}'
                self.assertEqual(self.through(url, host, 80), 0)
        origin = self.origin()
        for scheme in 'socks5h', 'socks4a', 'http', 'socks5':
            for host in ('a?.test', 'a#.test', 'a/.test', 'secret\\116.test', '[[10.0.0.4]]',
                         'stra\u00dfe.test'):
                upstream = tuple(socks.parse_chain(f'{scheme}://127.0.0.1:{origin.port}'))
                server = self.serve(upstream=upstream)
                with self.subTest(scheme, host=host), Peer(server.server_address) as peer:
                    peer.ask(Greeting(b'\0'), Choice)
                    name = host.encode()
                    peer.send(b'\5\1\0\3' + bytes([len(name)]) + name + b'\0\x50')
                    self.assertEqual(Response.unpack(peer.read).reply, Reply.GENERAL_FAILURE)
        self.assertEqual(origin.peers, [])

    def test_outcomes(self):
        """It is not we who refuse; and another proxy's words make no line of their own."""
        scripted = self.enter(Scripted([HEAD, crlf('HTTP/1.1 403 \x1b[2Jno\rno\n\n')]))
        last, refused = self.serve(), self.refused_port()
        for url, expected in (
                (f'socks5h://{last.server_address}', 'failed: Socket error: 0x05: Connection ref'),
                (f'socks5h://127.0.0.1:{refused}', 'failed: Error connecting to SOCKS5 proxy'),
                (f'http://127.0.0.1:{scripted.port}', r' failed: Socket error: 403: \x1b[2Jno\r')):
            server = self.serve(upstream=tuple(socks.parse_chain(url)))
            with self.subTest(url), Peer(server.server_address) as peer:
                name = ('example.org', 80) if 'http' in url else ('127.0.0.1', refused)
                self.assertNotEqual(peer.connect(*name).reply, 0)
                peer.sock.close()
                eventually(lambda: any(expected in line for line in self.lines))

    def test_what_cannot_be_passed_on(self):
        dead = f'socks5h://127.0.0.1:{self.refused_port()}'
        for scheme, command in (('socks5h', 2), ('http', 3), ('socks4', 3), ('http', 5)):
            server = self.serve(upstream=dead.replace('socks5h', scheme))
            with Peer(server.server_address) as peer:
                self.assertEqual(peer.request(command, Address('127.0.0.1', 1)).reply,
                                 Reply.COMMAND_NOT_SUPPORTED)
        server = self.serve(upstream=dead)
        self.assertEqual(self.peer(server.server_address).connect('127.0.0.1', 1).reply,
                         Reply.GENERAL_FAILURE)
        with self.assertRaises(socks.ProxyError):
            socks.run(socks.open_chain(socks.parse_chain(dead), Address('127.0.0.1', 1)))


class UdpUpstreamTest(DatagramCase, FileCase):
    """Datagrams by way of other proxies."""

    def setUp(self):
        socks.background_loop()                 # its thread stays
        super().setUp()
        certificate = self.write('certificate', CERTIFICATE)
        self.addCleanup(os.environ.pop, 'SSL_CERT_FILE', None)
        os.environ['SSL_CERT_FILE'] = certificate

    def url(self, server, scheme='socks5h'):
        return f'{scheme}://{server.server_address}'.replace('127.0.0.1', 'localhost')

    def next_proxy(self, *upstream, **settings):
        """A server that notes the commands that it does, and uses others itself."""
        class Noting(socks.Handler):
            def do(self, request):
                server.asked.append(int(request.command))
                return super().do(request)

        server = self.enter(socks.Server(('127.0.0.1', 0), Settings(
            upstream=list(upstream), **settings), Noting).start())
        server.asked = []
        return server

    def test_one_proxy(self):
        """By UDP to it, where that does not go past a layer."""
        for scheme, settings, command in (('socks5h', {}, 3), ('socks5', {}, 3),
                                          ('socks5h+tls', {'tls': server_context()}, 5)):
            last = self.next_proxy(**settings)
            server = self.serve(upstream=self.url(last, scheme))
            for associate in self.associate, self.stream:
                with self.subTest(scheme):
                    self.check_way(associate(server))
                    self.assertEqual(last.asked.pop(), command)
            self.assertEqual(last.asked, [])

    def test_proxy_that_sends_first(self):
        """Datagrams from there, before one of the client's, are dropped: it has no address yet."""
        def proxy(peer):
            peer.read(3)
            peer.send(b'\5\0')
            peer.read(10)
            peer.send(Response(0, Address('127.0.0.1', 0)).pack() + 3 * early)
            while True:
                peer.send(peer.read(1))         # datagrams come back

        early = StreamAssociate.message(Datagram(Address('127.0.0.1', 9), b'early').pack())
        upstream = f'socks5://127.0.0.1:{self.origin(proxy).port}?udp=tcp'
        for associate, settings in ((Associate, {}), (Associate, {'udp_port': unused_port()}),
                                    (Associate6, {'socks6': True})):
            with self.subTest(associate, settings=settings):
                server = self.serve(upstream=upstream, **settings)
                client = self.enter(associate(server))
                relay = self.relay_in(server)
                eventually(lambda: relay.dropped == 3)
                data = Datagram(Address('127.0.0.1', 9), b'x').pack()
                self.assertEqual(client.ask(data), data)

    def test_several_proxies(self):
        """Chains ask the last one for UDP in TCP; servers in a row do as each is told."""
        third = self.next_proxy()
        second = self.next_proxy(self.url(third))
        self.check_way(self.stream(self.serve(upstream=self.url(second, 'socks5'))))
        self.assertEqual((second.asked, third.asked), ([3], [3]))
        server = self.serve(upstream=[self.url(second, 'socks4a'), self.url(third, 'socks5h')])
        self.assertEqual(self.associate(server).response.reply, 0)
        self.assertEqual((second.asked, third.asked), ([3, 1], [3, 1, 5]))
        chain = [self.url(self.next_proxy(), 'http'), self.url(self.next_proxy(), 'socks4a'),
                 self.url(self.next_proxy(), 'socks5h')]
        self.check_way(self.associate(self.serve(upstream=chain)))

    @unittest.skipUnless(hasattr(socket, 'AF_UNIX'), 'there are no unix sockets')
    def test_unix_socket(self):
        path = self.write('x', '')[:-1] + 'socket'
        self.enter(socks.Server((f'unix:{path}', 0)).start())
        self.check_way(self.associate(self.serve(upstream=f'socks5h+unix://{path}')))

    def test_what_the_proxy_refuses(self):
        """With one proxy for all, the client gets its reply."""
        last = self.next_proxy(rules=['allow connect to *'])
        http_only = f'http://127.0.0.1:{last.server_address.port}'
        for upstream, code in ((self.url(last), Reply.NOT_ALLOWED),
                               ([http_only, self.url(last)], Reply.NOT_ALLOWED),
                               (f'socks5h://127.0.0.1:{self.refused_port()}',
                                Reply.GENERAL_FAILURE)):
            server = self.serve(upstream=upstream)
            for associate in self.associate, self.stream:
                self.assertEqual(associate(server).response, Response(code))

    def test_rules(self):
        """They count as for CONNECT: names that are passed on, and what is looked up here."""
        self.names(lambda name, family: ['127.0.0.1'])
        last, echo = self.next_proxy(), self.echo()
        for scheme, lines, host, allowed in (
                ('socks5h', 'allow to name.test', 'name.test', True),
                ('socks5h', 'allow to 127.0.0.1', 'name.test', False),
                ('socks5h', 'deny to 127.0.0.0/8|allow to *', 'localhost', False),
                ('socks5h', 'deny to 127.0.0.0/8|allow to *', '127.0.0.1', False),
                ('socks5', 'allow to 127.0.0.1', 'name.test', True),
                ('socks5', 'deny to 127.0.0.0/8|allow to *', 'name.test', False)):
            with self.subTest(scheme, rules=lines, host=host):
                server = self.serve(upstream=self.url(last, scheme), rules=lines.split('|'))
                client = self.stream(server)
                client.send(Datagram(Address(host, echo.address.port), b'x').pack())
                if allowed:
                    self.assertEqual(Datagram.unpack(client.receive()),
                                     Datagram(echo.address, b'E:x'))
                else:
                    eventually(lambda: self.relay_in(server).dropped)

    def test_ways_of_rules(self):
        """The association is opened when it is needed; each target has its own way."""
        one, other, echo = self.next_proxy(), self.next_proxy(), self.echo()
        self.names(lambda name, family: ['127.0.0.1'])
        dead = f'socks5h://127.0.0.1:{self.refused_port()}'
        server = self.serve(rules=[
            f'allow to one.test via {self.url(one)}',
            f'allow udp to .other.test via {self.url(other, "socks5")}',
            f'allow to next.test via {dead}', f'allow to next.test via {self.url(one)}',
            f'allow to here.test via {dead}', 'allow to here.test via direct',
            f'allow to dead.test via {dead}', 'allow to 127.0.0.1'])
        client = self.associate(server)
        for host, asked in (('127.0.0.1', ([], [])), ('one.test', ([3], [])),
                            ('a.other.test', ([3], [3])), ('b.other.test', ([3], [3])),
                            ('next.test', ([3], [3])), ('here.test', ([3], [3])),
                            ('one.test', ([3], [3]))):
            with self.subTest(host):
                data = Datagram(Address(host, echo.address.port), b'x').pack()
                self.assertEqual(Datagram.unpack(client.ask(data)), Datagram(echo.address, b'E:x'))
                self.assertEqual((one.asked, other.asked), asked)
        client.send(Datagram(Address('dead.test', echo.address.port), b'x').pack())
        eventually(lambda: self.relay_in(server).dropped)
        self.assertEqual(len(set(echo.senders)), 3)

    @unittest.skipUnless(sys.platform == 'linux', '127.0.0.5 is only here')
    def test_local_addresses(self):
        echo = self.echo()
        server = self.serve(rules=[f'allow to 127.0.0.1 {echo.address.port} via 127.0.0.5',
                                   'allow to 127.0.0.1 via inbound', 'allow to * via direct'],
                            source=('127.0.0.4',), host='127.0.0.3')
        client, inbound, direct = self.stream(server), self.echo(), self.echo('127.0.0.2')
        for target in echo, inbound, direct:
            client.ask(Datagram(target.address, b'x').pack())
        self.assertEqual([target.senders[0][0] for target in (echo, inbound, direct)],
                         ['127.0.0.5', '127.0.0.3', '127.0.0.4'])

    def test_proxy_that_ends(self):
        """The next datagram opens another association, not too soon after the last one."""
        echo = self.echo()
        for scheme, settings in (('socks5h', {}), ('socks5h+tls', {'tls': server_context()})):
            last = self.next_proxy(**settings)
            server = self.serve(upstream=self.url(last, scheme))
            client = self.stream(server)
            data = Datagram(echo.address, b'x').pack()
            self.assertEqual(client.ask(data)[-3:], b'E:x')
            relay = self.relay_in(server)
            self.end_relay_in(last)
            eventually(lambda: not relay.far)
            self.assertEqual(client.ask(data)[-3:], b'E:x')
            self.end_relay_in(last)
            eventually(lambda: not relay.far)
            client.send(data)
            eventually(lambda: relay.dropped)
            relay.routes._failed.clear()
            relay.routes._pauses.clear()
            self.assertEqual(client.ask(data)[-3:], b'E:x')
            self.assertEqual(len(last.asked), 3)

    def end_relay_in(self, server):
        relay = self.relay_in(server)
        server.loop.call(relay, relay.close, 'done')

    def test_many_wait_for_one_association(self):
        """They are sent in order when it is open, and none is lost."""
        last, echo = self.next_proxy(), self.echo()
        server = self.serve(rules=[f'allow to * via {self.url(last)}'])
        client = self.stream(server)
        names = [Address(name, echo.address.port) for name in ('localhost', '127.0.0.1')]
        client.control.send(b''.join(client.message(Datagram(name, b'%d' % number).pack())
                                     for number in range(50) for name in names))
        numbers = sorted(int(Datagram.unpack(client.receive()).payload[2:]) for _ in range(100))
        self.assertEqual(numbers, sorted([*range(50), *range(50)]))
        self.assertEqual(last.asked, [3])
        relay = self.relay_in(server)
        self.assertEqual((relay.routes._count, relay.routes._size, relay.dropped), (0, 0, 0))

    def test_reload(self):
        """Datagrams go another way from then on, or to nobody."""
        one, other, echo = self.next_proxy(), self.next_proxy(), self.echo()
        server = self.serve(upstream=self.url(one))
        client, data = self.associate(server), Datagram(echo.address, b'x').pack()
        self.assertEqual(client.ask(data)[-3:], b'E:x')
        routes = self.relay_in(server).routes
        for upstream, asked in ((self.url(other), ([3], [3])), ([], ([3], [3])),
                                (self.url(one), ([3], [3]))):
            server.reconfigure(server.settings._replace(upstream=upstream))
            eventually(lambda: not routes.known)
            self.assertEqual(client.ask(data)[-3:], b'E:x')
            self.assertEqual((one.asked, other.asked), asked)
        self.assertEqual(echo.senders[0], echo.senders[3])
        self.assertEqual(len(set(echo.senders)), 3)
        server.reconfigure(server.settings._replace(rules='deny to 127.0.0.1'))
        eventually(lambda: not routes.known)
        client.send(data)
        eventually(lambda: self.relay_in(server).dropped)

    @needs_ipv6
    def test_version_of_ip(self):
        """What is looked up here has the one that is set; the next proxy decides for itself."""
        self.names(lambda name, family: ['::1', '127.0.0.1'])
        last, four, six = self.next_proxy(), self.echo(), None
        six = self.enter(Echo('::1', b'six:', four.address.port))
        for version, scheme, answer in ((4, 'socks5', b'E:x'), (6, 'socks5', b'six:x'),
                                        (0, 'socks5', b'six:x')):
            client = self.stream(self.serve(upstream=self.url(last, scheme), family=version))
            data = Datagram(Address('both.test', four.address.port), b'x').pack()
            self.assertTrue(client.ask(data).endswith(answer))
        client = self.stream(self.serve(upstream=self.url(last), family=4))
        self.assertEqual(client.ask(Datagram(six.address, b'x').pack())[-5:], b'six:x')

    def test_strict(self):
        """From whom the client has sent nothing to, nothing comes; it may have by a name."""
        last, echo = self.next_proxy(), self.echo()
        for scheme, passes in (('socks5', False), ('socks5h', True)):
            client = self.associate(self.serve(upstream=self.url(last, scheme), udp_strict=True))
            other = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            other.bind(('127.0.0.1', 0))
            for host in '127.0.0.1', 'localhost':
                client.ask(Datagram(Address(host, echo.address.port), b'x').pack())
                other.sendto(b'y', echo.senders[-1])
                if passes and host == 'localhost':
                    self.assertEqual(client.receive()[-1:], b'y')
                else:
                    self.assertTrue(client.nothing_comes())

    def test_wrong_answers(self):
        """What the next proxy sends that is no datagram, or a fragment, does no harm; a name as
        the sender is passed on."""
        class Rogue(socks.Handler):
            def do_UDP_ASSOCIATE(self, request):
                relay = yield from super().do_UDP_ASSOCIATE(request)
                server.relays.append(relay)
                return relay

        server = self.enter(socks.Server(('127.0.0.1', 0), handler_class=Rogue).start())
        server.relays = []
        echo = self.echo()
        client = self.associate(self.serve(upstream=self.url(server)))
        data = Datagram(echo.address, b'x').pack()
        client.ask(data)
        relay, = server.relays
        for answer in ('', '00', '000000017f', '0000000203', '000001017f000001000978',
                       '00000003000009', '00000003035c2f25000978', '0000000301ff000978'):
            relay.near.send(hexed(answer))
        for name in 'a.test', '.'.join(['b' * 62] * 4):
            answer = Datagram(Address(name, 9), b'y').pack()
            relay.near.send(answer)
            self.assertEqual(client.receive(), answer)
        self.assertEqual(client.ask(data)[-3:], b'E:x')

    def test_error_of_an_earlier_datagram(self):
        """It costs no later one."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay:
            relay.bind(('127.0.0.1', 0))
            port = relay.getsockname()[1]
            near = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            near.connect(relay.getsockname())
        near.send(b'')                  # which is refused
        eventually(lambda: ready([near], [], 0))
        relay = self.enter(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        relay.bind(('127.0.0.1', port))
        relay.settimeout(PATIENCE)
        socks.FarAssociation(near).sendto(b'x', Address('192.0.2.1', 9))
        self.assertEqual(relay.recv(100), hexed('00000001c0000201000978'))

    def test_client_leaves_during_the_opening(self):
        """Then nothing is left."""
        silent = f'socks5h://127.0.0.1:{self.silent_port()}'
        for settings in {'upstream': silent}, {'rules': [f'allow to * via {silent}']}:
            server = self.serve(**settings)
            peer = self.peer(server.server_address)
            peer.send(hexed('050100 0505000100000000 0000') + StreamAssociate.message(
                Datagram(Address('192.0.2.1', 9), b'x').pack()))
            eventually(lambda: server.clients and server.clients[0].command)
            peer.reset()
            eventually(lambda: not server.clients)


class ServiceTest(FileCase):
    """The server as a process: signals, workers, systemd."""

    def tunnel_through(self, program, origin):
        near, before = self.peer(program.address), len(origin.peers)
        self.assertEqual(near.connect('127.0.0.1', origin.port).reply, 0)
        eventually(lambda: len(origin.peers) > before)
        return near, origin.peers[-1]

    def test_drain(self):
        """TERM: no new clients; those that there are may end."""
        origin = self.origin()
        with Program('--drain', '20') as program:
            near, far = self.tunnel_through(program, origin)
            program.process.send_signal(signal.SIGTERM)
            eventually(lambda: not listens(program.port))
            far.send(b'to the last byte')
            far.finish()
            near.finish()
            self.assertEqual(near.rest(), b'to the last byte')
            self.assertEqual(program.process.wait(PATIENCE), 0)
        for seconds, second in (('0.2', None), ('20', signal.SIGTERM), ('20', signal.SIGINT)):
            with self.subTest(second), Program('--drain', seconds) as program:
                self.tunnel_through(program, origin)
                program.process.send_signal(signal.SIGTERM)
                eventually(lambda: not listens(program.port))
                self.assertEqual(program.stop(second) if second else
                                 program.process.wait(PATIENCE), 0)

    def test_reload(self):
        """HUP: new rules and users, old tunnels; a file that is wrong changes nothing."""
        rules, users = self.write('rules', 'allow to *'), self.write('users', 'bob:s')
        log = os.path.join(self.folder, 'log')
        origin = self.origin()
        with Program('--rules', rules, '--users', users, '--log-file', log,
                     '--trust', '127.0.0.0/8') as program:
            def logged(text):
                with open(log) as file:
                    return text in file.read()

            tunnels = [self.tunnel_through(program, origin) for _ in range(20)]
            self.write('rules', 'deny to *')
            program.process.send_signal(signal.SIGHUP)
            eventually(lambda: logged('INFO reloaded'))
            self.assertEqual(self.peer(program.address).connect('127.0.0.1', origin.port).reply,
                             Reply.NOT_ALLOWED)
            self.write('rules', 'allow to *\nnonsense')
            os.rename(log, log + '.1')
            program.process.send_signal(signal.SIGHUP)
            eventually(lambda: os.path.exists(log) and logged("rules:2: 'nonsense', expected"))
            self.assertEqual(self.peer(program.address).connect('127.0.0.1', origin.port).reply,
                             Reply.NOT_ALLOWED)
            for near, far in tunnels:
                far.send(b'x')
                self.assertEqual(near.read(1), b'x')

    def test_drain_of_a_full_server(self):
        """One ends just before TERM, which must not end the others."""
        origin = self.origin()
        with Program('--max-clients', '2', '--drain', '20') as program:
            tunnels = [self.tunnel_through(program, origin) for _ in range(2)]
            waiting = self.peer(program.address)
            time.sleep(0.2)                             # until it is full
            program.process.send_signal(signal.SIGSTOP)
            tunnels[0][0].reset()
            program.process.send_signal(signal.SIGTERM)
            program.process.send_signal(signal.SIGCONT)
            with contextlib.suppress(OSError):
                waiting.rest()
            tunnels[1][1].send(b'x')
            self.assertEqual(tunnels[1][0].read(1), b'x')
            tunnels[1][0].sock.close()
            tunnels[1][1].sock.close()
            self.assertEqual(program.process.wait(PATIENCE), 0)

    def test_a_log_that_cannot_be_written(self):
        folder = self.place('logs')
        os.mkdir(folder)
        log, origin = os.path.join(folder, 'log'), self.origin(echo)
        with Program('--log-file', log) as program:
            shutil.rmtree(folder)
            for _ in range(2):
                self.tunnel_through(program, origin)[0].sock.close()
            program.process.send_signal(signal.SIGHUP)
            line = f'socks.py: {log}: No such file or directory: '
            eventually(lambda: line in program.so_far())
            os.mkdir(folder)
            for _ in range(2):
                self.tunnel_through(program, origin)[0].sock.close()
            eventually(lambda: 'CONNECT' in open_text(log))
            self.assertEqual(program.stop(), 0)
        self.assertNotIn('Traceback', program.log)

    def test_a_log_that_nobody_reads(self):
        """It stops neither clients nor signals, with and without workers; what fits comes later."""
        origin = self.origin(echo)
        for job in [Background(self.log_unread, origin, *options) for options in ((), ('-w', '2'))]:
            job.result()

    def log_unread(self, origin, *options):
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b'.' * 4096)
        os.set_blocking(writing, True)
        with subprocess.Popen(socks_py('-p', '0', '-v', *options), stdout=subprocess.PIPE,
                              stderr=writing) as process:
            self.addCleanup(process.kill)
            os.close(writing)
            address = '127.0.0.1', int(process.stdout.readline().rpartition(b':')[2])
            for _ in range(5):
                process.send_signal(signal.SIGUSR1)
                with Peer(address) as peer:
                    self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)
                    peer.send(b'hello')
                    self.assertEqual(peer.read(5), b'hello')
            if not options:
                os.set_blocking(reading, False)
                text = b''

                def reads_all():
                    nonlocal text
                    with contextlib.suppress(BlockingIOError):
                        text += os.read(reading, 1 << 20)
                    return text.count(b': done, 5 bytes up') == 5
                eventually(reads_all)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)

    def test_log_writer(self):
        """What is too much is lost and counted, and the rest is whole and in order."""
        path = self.place('fifo')
        os.mkfifo(path)
        writer = socks.LogWriter(path)
        self.addCleanup(writer.close)
        writer.RETRY, writer.PAUSE, writer.LIMIT = 0.01, 0.001, 40
        writer.setFormatter(socks.TextFormatter(has_time=False))

        def write(number):
            writer.handle(logging.makeLogRecord(dict(
                msg='line %d ' + 'x' * 2000, args=(number,), levelname='INFO')))

        with contextlib.redirect_stderr(io.StringIO()):         # it says that nobody reads
            for number in range(300):
                write(number)
            with open(path, 'rb', 0) as reading:
                lines = []
                while not lines or b'of the log here' not in lines[-1]:
                    lines.append(reading.readline())
                    self.assertTrue(lines[-1])
                write(300)
                last = reading.readline()
        *lines, lost = [line.decode() for line in lines]
        numbers = [int(line.split()[2]) for line in lines]      # 40 is taken for sure
        self.assertEqual(numbers, sorted({*range(40), *numbers}))
        self.assertEqual(lines, [f'INFO line {number} ' + 'x' * 2000 + '\n' for number in numbers])
        self.assertEqual(lost, f'WARNING lost {300 - len(lines)} lines of the log here\n')
        self.assertGreaterEqual(len(lines), 40)
        self.assertTrue(last.startswith(b'INFO line 300 '))

    def test_log_writer_ends_in_time(self):
        path = self.place('fifo')
        os.mkfifo(path)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 'rb', 0) as reading:
            writer = socks.LogWriter(path)
            writer.PATIENCE, writer.RETRY = 0.1, 0.05
            writer.setFormatter(socks.TextFormatter(has_time=False))
            for _ in range(1000):
                writer.handle(logging.makeLogRecord(dict(msg='x' * 1000, levelname='INFO')))
            started = time.monotonic()
            writer.flush()
            self.assertLess(time.monotonic() - started, 5)
            list(iter(lambda: reading.read(1 << 16), None))
            eventually(lambda: reading.read(1 << 16) is None and writer._is_idle)
            writer.close()

    @unittest.skipUnless(os.path.exists('/dev/full'), 'the system has no /dev/full')
    def test_a_full_disk(self):
        """It is told once, on stderr."""
        writer = socks.LogWriter('/dev/full')
        writer.RETRY, writer.PATIENCE = 0.01, 0.1
        writer.setFormatter(socks.TextFormatter(has_time=False))
        errors = self.enter(tempfile.TemporaryFile('w+'))
        with contextlib.redirect_stderr(errors):
            for _ in range(2):
                writer.handle(logging.makeLogRecord(dict(msg='x', levelname='INFO')))
                writer.flush()
            eventually(lambda: os.fstat(errors.fileno()).st_size)
            writer._path = os.devnull                           # there is room again
            eventually(lambda: writer._is_idle)
            writer.close()
        errors.seek(0)
        self.assertEqual(errors.read(), 'socks.py: /dev/full: No space left on device: lines of '
                                        'the log have to wait\n')

    def test_moved_log(self):
        """The next line begins a new file; no signal is needed."""
        path = self.write('log', '')
        writer = socks.LogWriter(path)
        self.addCleanup(writer.close)
        writer.setFormatter(socks.TextFormatter(has_time=False))
        for name in 'first', 'second':
            writer.handle(logging.makeLogRecord(dict(msg=name, levelname='INFO')))
            eventually(lambda: open_text(path) == f'INFO {name}\n')
            os.rename(path, path + '.' + name)

    def test_traceback_makes_no_record(self):
        """Whatever an exception's text is."""
        try:
            raise ValueError('a\n2026-01-01 00:00:00,000 INFO forged\x1b[2J\r')
        except ValueError:
            record = logging.makeLogRecord(dict(msg='b\nc', levelname='ERROR',
                                                exc_info=sys.exc_info()))
        first, *rest = socks.TextFormatter(has_time=False).format(record).split('\n')
        self.assertEqual(first, 'ERROR b\\nc')
        self.assertGreater(len(rest), 3)
        for line in rest:
            self.assertRegex(line, '^  [ -~]*$')

    def test_table_in_json(self):
        origin, log = self.origin(), self.place('log')
        with Program('--log-file', log, '--log-format', 'json', '-q',
                     '--max-clients', '2') as program:
            tunnels = [self.tunnel_through(program, origin) for _ in range(2)]
            tunnels[0][0].send(b'12345')
            tunnels[0][1].read(5)
            program.process.send_signal(signal.SIGUSR1)
            eventually(lambda: open_text(log).count('\n') == 3)
        about, *clients = map(json.loads, open_text(log).splitlines())
        self.assertEqual((about['clients'], about['limit'], about['before']), (2, 2, 0))
        self.assertEqual([(entry['command'], entry['outcome'], entry['down'])
                          for entry in clients], [('CONNECT', 'open', 0)] * 2)
        self.assertEqual({entry['up'] for entry in clients}, {0, 5})
        self.assertEqual(program.log, '')

    def test_full_server_and_drain_are_logged(self):
        with Program('--max-clients', '1', '--drain', '20') as program, \
                Peer(program.address) as peer, Peer(program.address):
            peer.ask(Greeting(b'\0'), Choice)
            text = 'WARNING serving 1 client, more have to wait (--max-clients)'
            eventually(lambda: text in program.so_far())
            program.process.send_signal(signal.SIGUSR1)
            eventually(lambda: ': 1 of 1 client now, ' in program.so_far())
            program.process.send_signal(signal.SIGTERM)
            eventually(lambda: 'INFO draining 1 client, up to 20 s' in program.so_far())
        self.assertEqual(program.log.count('more have to wait'), 1)

    def test_table(self):
        origin = self.origin()
        with Program() as program:
            near, far = self.tunnel_through(program, origin)
            near.send(b'12345')
            far.read(5)
            program.process.send_signal(signal.SIGUSR1)
            eventually(lambda: program.so_far().count('\n') >= 3)
        self.assertRegex(program.log, r'process \d+: 1 client now, 0 before')
        self.assertRegex(program.log, r'\d  -     SOCKS5    CONNECT  127.0.0.1:\d+  5   0     0')

    def test_workers(self):
        """They share the work; a dead one is replaced; they do not outlive their parent."""
        origin, target = self.origin(echo), self.enter(Echo())
        with Program('-w', '3') as program:
            def workers():
                return children(program.process.pid)

            first = eventually(lambda: len(workers()) == 3 and workers())
            url = f'socks5h://127.0.0.1:{program.port}'
            for _ in range(9):
                with socks.create_connection(('127.0.0.1', origin.port), proxy=url) as sock:
                    sock.sendall(b'hello')
                    self.assertEqual(sock.recv(5, socket.MSG_WAITALL), b'hello')
            with socks.create_server(proxy=url, timeout=PATIENCE) as waiting:
                with self.peer(waiting.getsockname()):
                    waiting.accept()[0].close()
            with socks.socksocket(type=socket.SOCK_DGRAM, proxy=url) as sock:
                sock.settimeout(PATIENCE)
                sock.sendto(b'x', target.address)
                self.assertEqual(sock.recv(10), b'E:x')
            os.kill(first[0], signal.SIGKILL)
            started = time.monotonic()
            eventually(lambda: len({*workers()} - {first[0]}) == 3)
            self.assertLess(time.monotonic() - started, 1)
            last = [pid for pid in workers() if pid != first[0]]
            program.process.kill()
            program.process.wait()
            for pid in last:
                eventually(lambda: has_ended(pid))
        with Program('-w', 'auto', '--drain', '1') as program:
            for _ in range(100):        # more signals than one can count
                program.process.send_signal(signal.SIGHUP)
                program.process.send_signal(signal.SIGUSR1)
            with Peer(program.address) as peer:
                self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))
            self.assertEqual(program.stop(), 0)
        self.assertNotIn('Traceback', program.log)
        self.assertNotIn('ended with', program.log)

    def test_no_process_for_a_worker(self):
        """It is tried again; the others serve on."""
        script = '''if True:
            import errno, os, sys, socks
            fork, calls = os.fork, 0
            def failing():
                global calls
                calls += 1
                if calls in (2, 4, 5):
                    raise OSError(errno.EAGAIN, 'too many')
                return fork()
            os.fork = failing
            sys.exit(socks.main(sys.argv[3:]))'''
        with Program('-w', '2', prefix=(sys.executable, '-c', script), cwd=compiled()) as program:
            first = eventually(lambda: len(children(program.process.pid)) == 2
                               and children(program.process.pid))
            os.kill(first[0], signal.SIGKILL)
            eventually(lambda: len({*children(program.process.pid)} - {first[0]}) == 2)
            self.assertIn(first[1], children(program.process.pid))
            self.assertEqual(program.stop(), 0)
        self.assertEqual(program.log.count('ERROR cannot start a worker: too many'), 3)
        self.assertNotIn('Traceback', program.log)

    def test_frozen_worker(self):
        """systemd's watchdog counts for each: one that does not answer is replaced."""
        with Program('-w', '2', WATCHDOG_USEC='600000') as program:
            first = eventually(lambda: len(children(program.process.pid)) == 2
                               and children(program.process.pid))
            os.kill(first[0], signal.SIGSTOP)
            eventually(lambda: f'ERROR worker {first[0]} does not answer' in program.so_far())
            eventually(lambda: len({*children(program.process.pid)} - {first[0]}) == 2)
            self.assertEqual(program.stop(), 0)

    def test_terminal_that_is_closed(self):
        """Its HUP ends the server; one from somebody else reloads, as all do under nohup."""
        for arguments in (), ('-w', '2'):
            with self.subTest(arguments), Terminal() as terminal, Program(
                    *arguments, prefix=terminal.prefix) as program:
                program.process.send_signal(signal.SIGHUP)
                eventually(lambda: 'INFO reloaded' in program.so_far())
                terminal.close()        # the system sends HUP then
                self.assertEqual(program.process.wait(PATIENCE), 0)
        with Terminal() as terminal, Program(prefix=(*terminal.prefix, 'nohup')) as program:
            terminal.close()
            program.process.send_signal(signal.SIGHUP)
            eventually(lambda: 'INFO reloaded' in program.so_far())
            self.assertEqual(program.stop(), 0)

    def test_a_worker_with_room_is_found(self):
        """Whichever of two that serve one client each is free, the next client comes to it."""
        with Program('-w', '2', '--max-clients', '2') as program, contextlib.ExitStack() as stack:
            def client():
                peer = stack.enter_context(Peer(program.address))
                self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))
                return peer

            clients = []
            for number in 0, 1, 1, 0:
                for each in clients[number:number + 1]:
                    each.sock.close()
                time.sleep(0.4)         # until one that was full has looked again
                clients[number:number + 1] = [client()]

    def test_workers_of_a_strange_parent(self):
        """It left another child behind, and has SIGCHLD ignored."""
        command = 'trap "" CHLD; sleep 0.3 & exec "$0" "$@"'
        with Program('-w', '2', prefix=('sh', '-c', command)) as program:
            def workers():
                return children(program.process.pid, 'socks.py')

            eventually(lambda: len(workers()) == 2)
            time.sleep(0.5)             # until the other child has ended
            os.kill(workers()[0], signal.SIGKILL)
            eventually(lambda: 'ended with' in program.so_far() and len(workers()) == 2)
            self.assertEqual(program.stop(), 0)
        self.assertEqual(program.log.count('ended with'), 1)

    def test_socket_activation(self):
        """systemd hands over sockets, and is told how it goes."""
        path = self.place('notify')
        notify = self.enter(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notify.bind(path)
        notify.settimeout(PATIENCE)
        origin = self.origin(echo)
        sockets = [self.enter(socket.socket()) for _ in range(2)]
        for sock in sockets:
            sock.bind(('127.0.0.1', 0))
            sock.listen(5)
        script = '''\
import fcntl, os, sys
for number, fd in enumerate([fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:3]], 3):
    os.dup2(fd, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2')
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
'''
        for options in ((), ('-w', '2')):
            process = self.enter(subprocess.Popen(
                [sys.executable, '-c', script, *(str(sock.fileno()) for sock in sockets),
                 *socks_py(*options)[1:]],
                pass_fds=[sock.fileno() for sock in sockets], stderr=subprocess.PIPE,
                env=dict(os.environ, NOTIFY_SOCKET=path, WATCHDOG_USEC='200000')))
            seen = set()
            while not seen >= {b'READY=1', b'WATCHDOG=1'}:
                seen.add(notify.recv(100))
            for sock in sockets:
                with socks.create_connection(('127.0.0.1', origin.port), proxy='socks5h://%s:%d'
                                             % sock.getsockname()) as sock:
                    sock.sendall(b'hello')
                    self.assertEqual(sock.recv(5, socket.MSG_WAITALL), b'hello')
            if not options:
                process.send_signal(signal.SIGHUP)
                while not notify.recv(100).startswith(b'RELOADING=1\nMONOTONIC_USEC='):
                    pass
            process.send_signal(signal.SIGTERM)
            while notify.recv(100) != b'STOPPING=1':
                pass
            process.communicate(timeout=PATIENCE)
            self.assertEqual(process.returncode, 0)

    def test_json_log(self):
        log = self.place('log')
        origin = self.origin(echo)
        with Program('--log-file', log, '--log-format', 'json') as program:
            self.tunnel_through(program, origin)[0].sock.close()
            eventually(lambda: open_text(log).count('\n') == 2)
        first, second, *_ = map(json.loads, open_text(log).splitlines())
        self.assertEqual((first['level'], first['message']),
                         ('INFO', f'listening on 127.0.0.1:{program.port}'))
        self.assertEqual((second['protocol'], second['command'], second['outcome'], second['up']),
                         ('SOCKS5', 'CONNECT', 'done', 0))

    def test_the_journal_has_its_own_time(self):
        with Program(JOURNAL_STREAM='8:1') as program:
            program.stop()
        self.assertTrue(program.log.startswith('INFO listening on '))

    def test_check(self):
        good = self.write('rules', 'allow to *'), self.write('users', 'bob:s')
        bad = self.write('bad', 'nonsense')
        for arguments, status, text in (
                (('--rules', good[0], '--users', good[1]), 0, ''), (('--rules', bad), 1, 'bad:1:'),
                (('--users', bad), 1, 'bad:1:'),
                (('--users', bad + 'x'), 1, f'socks.py: --users {bad}x: No such file'),
                (('--rules', self.folder), 1, f'socks.py: --rules {self.folder}: Is a directory'),
                (('--tls-cert', bad + 'x'), 1, f'socks.py: --tls-cert {bad}x: No such file'),
                (('-b', '0.0.0.0'), 2, 'would serve everybody'),
                (('--tls-cert', bad), 1, 'bad: '), (('--source', '203.0.113.1'), 1, 'not an add')):
            with self.subTest(arguments):
                found, out, err = in_process('--check', *arguments)
                self.assertEqual(found, status, err)
                self.assertIn(text, err)
                self.assertEqual(err.count('socks.py: '), bool(status))
                self.assertEqual(out, '' if status else '1 user, 1 rule: ok\n')

    def test_check_shows_all(self):
        """Every fault of every file; and what is hardly meant, of rules and users."""
        rules, users = self.write('rules', 'nonsense\nallow\n'), self.write('users', 'bob\neve\n')
        status, out, err = in_process('--check', '--rules', rules, '--users', users)
        self.assertEqual((status, out), (1, ''))
        self.assertEqual(re.findall(r'^socks.py: .*/(\w+:\d):', err, re.MULTILINE),
                         ['users:1', 'users:2', 'rules:1', 'rules:2'])
        for text, doubt in (
                ('deny user bobb bob to .example\nallow to *', '1: user bobb does not exist'),
                ('allow to *\ndeny to 10.0.0.0/8\ndeny to .example',
                 '2: never reached, {}:1 matches everything')):
            self.write('rules', text), self.write('users', 'bob:s\nann:s\n')
            with self.subTest(text), self.assertLogs('socks', 'WARNING') as logged:
                status, out, err = in_process('--check', '--rules', rules, '--users', users)
                self.assertEqual((status, err), (0, ''))
                self.assertRegex(out, '^2 users, [23] rules: ok\n$')
            self.assertEqual([record.getMessage() for record in logged.records],
                             [f'{rules}:{doubt}'.format(rules)])
        self.write('rules', 'allow user alice to *')
        status, out, err = in_process('--check', '--rules', rules, '--ident')
        self.assertEqual((status, out, err), (0, '0 users, 1 rule: ok\n', ''))
        self.write('rules', 'allow to * via socks5h://192.0.2.1\nallow to *')     # the next way
        status, out, err = in_process('--check', '--rules', rules)
        self.assertEqual((status, out, err), (0, '0 users, 2 rules: ok\n', ''))

    def test_hash_password_on_a_terminal(self):
        """It is asked for twice; Ctrl-C is no error."""
        for answers, status, text in (
                (('secret\n', 'secret\n'), 0, ''), (('secret\n', 'secrets\n'), 1, 'differ'),
                (('\3',), 1, ''), (('secret\n', '\3'), 1, ''), (('\n',), 1, 'expected a password')):
            with self.subTest(answers), Terminal() as terminal, subprocess.Popen(
                    [*terminal.prefix, *socks_py('--hash-password')], stdin=terminal.slave,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    universal_newlines=True) as process:
                try:
                    terminal.answer(('Password: ', 'Again: '), answers)
                    out, err = process.communicate(timeout=PATIENCE)
                finally:
                    process.kill()
                self.assertEqual(process.returncode, status)
                self.assertEqual(bool(out), not status)
                self.assertIn(text, err)
                self.assertLess(err.count('\n'), 2)
                self.assertNotIn('Traceback', err)

    def test_hash_password(self):
        done = run(*socks_py('--hash-password'), input='secret\n')
        self.assertTrue(socks.Hashed(done.stdout.strip()).verify(b'secret'))
        done = run(sys.executable, '-c', 'import os, sys; os.close(1); os.execv(sys.executable, '
                   'sys.argv)', *socks_py('--hash-password'), input='secret')
        self.assertEqual(done.returncode, 1)
        for data in (b'', b'\n', b'x' * 256):
            self.assertEqual(in_process('--hash-password', data=data), (
                1, '', 'socks.py: expected a password of 1 to 255 bytes\n'))


def open_text(path):
    """What stands in a file; nothing if there is none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(path) as file:
        return file.read()
    return ''


# ------------------------------------------------------------------------- command line and README

class Program:
    """`python socks.py` as a process on a free port; its log is in `log` afterwards."""

    def __init__(self, *arguments, prefix=(), command=None, cwd=None, **environment):
        self.errors = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(
            [*prefix, *(command or socks_py()), '-p', '0', *arguments],
            stdout=subprocess.PIPE, stderr=self.errors, universal_newlines=True, cwd=cwd,
            env=dict(os.environ, **environment))
        self.address = ('127.0.0.1', int(self.process.stdout.readline().rpartition(':')[2]))
        self.port = self.address[1]

    def __enter__(self):
        return self

    def stop(self, number=signal.SIGTERM):
        """The exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def so_far(self):
        """What is logged already."""
        return os.pread(self.errors.fileno(), 1 << 20, 0).decode()

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.stop()
        self.process.stdout.close()
        self.errors.seek(0)
        self.log = self.errors.read()
        self.errors.close()


class Terminal:
    """A terminal for one program, which is started by `prefix`."""

    def __init__(self):
        try:
            self.master, self.slave = os.openpty()
        except (AttributeError, OSError):       # Windows, a folder /dev that lacks it
            raise unittest.SkipTest('there are no terminals here') from None
        script = (
            'import os, sys, signal; os.setsid(); os.close(os.open(sys.argv[1], os.O_RDWR));'
            'signal.signal(signal.SIGINT, signal.SIG_DFL);'     # a shell's & has them ignored
            'signal.signal(signal.SIGHUP, signal.SIG_DFL);'     # and so has nohup
            'os.execvp(sys.argv[2], sys.argv[2:])')
        self.prefix = (sys.executable, '-ISc', script, os.ttyname(self.slave))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        for descriptor in filter(None, (self.master, self.slave)):
            os.close(descriptor)
        self.master = self.slave = None

    def write(self, text):
        os.write(self.master, text.encode())

    def expect(self, text):
        """Read on until `text` is there."""
        seen = ''
        while text not in seen:
            if not ready([Descriptor(self.master)], [], PATIENCE):
                raise AssertionError(f'{text!r} expected, then came {seen!r}')
            seen += os.read(self.master, 1000).decode()

    def answer(self, prompts, answers):
        """Wait for each prompt, and write the answer to it; there may be fewer answers."""
        for prompt, answer in zip(prompts, answers):
            self.expect(prompt)
            self.write(answer)


class Descriptor(int):
    """With the method that sockets have."""

    def fileno(self):
        return int(self)


# Arguments, and what the one line of the error must say.
WRONG_USAGE = [
    (['-p', '65536'], r"-p/--port: '65536': expected a port, 0 to 65535"),
    (['-p', 'x'], r"-p/--port: 'x': expected a port"),
    (['-b', '1.2.3.4:x'], r"-b/--bind: 'x': expected a port"),
    (['-b', ''], r"-b/--bind: '': expected ADDRESS"),
    (['-b', 'a:b:c'], r"-b/--bind: 'a:b:c': expected ADDRESS"),
    (['-b', '[1.2.3.4]'], r"-b/--bind: '\[1.2.3.4\]': expected ADDRESS"),
    (['-b', '*:1085'], r"-b/--bind: '\*:1085': expected 0.0.0.0 for all IPv4 addresses, :: for"),
    (['-b', '*'], r"-b/--bind: '\*': expected 0.0.0.0 for all IPv4 addresses, :: for all"),
    (['--advertise', 'fe80::1%lo'], r"--advertise: 'fe80::1%lo': expected an IP address"),
    (['--source', '::1%lo'], r"--source: '::1%lo': expected an IP address"),
    (['-u', 'bob'], r'-u/--user: expected NAME:PASSWORD'),
    (['-u', ':secret'], r'-u/--user: expected NAME:PASSWORD'),
    (['-u', 'bob:'], r'-u/--user: expected NAME:PASSWORD, of 1 to 255 bytes each'),
    (['-u', 'b' * 256 + ':x'], r'-u/--user: expected NAME:PASSWORD'),
    (['-u', 'bob:a', '-u', 'bob:b'], r'a user is given twice'),
    (['--source', 'localhost'], r"--source: 'localhost': expected an IP address"),
    (['--source', '127.0.0.1', '--source', '127.0.0.2'], r'--source: expected at most one IPv4'),
    (['--advertise', '::1', '--advertise', '::2'], r'--advertise: expected at most one IPv4'),
    (['--udp-ports', '5-4'], r"--udp-ports: '5-4': expected LOW-HIGH, from 1 to 65535"),
    (['--udp-ports', '0'], r"--udp-ports: '0': expected LOW-HIGH"),
    (['--udp-ports', '1-x'], r"--udp-ports: '1-x': expected LOW-HIGH"),
    (['--udp-ports', ''], r"--udp-ports: '': expected LOW-HIGH"),
    (['--udp-port', '0'], r"--udp-port: '0': expected a port, 1 to 65535"),
    (['--udp-port', '65536'], r"--udp-port: '65536': expected a port, 1 to 65535"),
    (['--udp-port', '5', '-w', '2'], r'--udp-port: expected one worker process; with -w'),
    (['--udp-port', '5', '--udp-ports', '6-7'], r'--udp-port, --udp-ports: expected only one'),
    (['--udp-port', '5', '--udp-ports', '6', '--check'], r'--udp-ports: expected only one'),
    (['--idle-timeout', '-1'], r"--idle-timeout: '-1': expected seconds, 0 or more"),
    (['--connect-timeout', 'nan'], r"--connect-timeout: 'nan': expected seconds"),
    (['--max-clients', '1.5'], r"--max-clients: '1.5': expected a whole number"),
    (['-b', '0.0.0.0'], r'would serve everybody.*SOCKS_USERS.*--open'),
    (['-p', '²'], r"-p/--port: '²': expected a port"),
    (['--frobnicate'], r'unrecognized arguments: --frobnicate$'),
    (['--prot', '1'], r'unrecognized arguments: --prot 1; is --proxy-protocol or --port or --prox'),
    (['1080'], r'unrecognized arguments: 1080$'),
    (['--from', '10.0.0.1/8'], r"--from: '10.0.0.1/8', expected 10.0.0.0/8 for the network, or 10"),
    (['--trust', 'x'], r"--trust: 'x', expected a network, 192.0.2.0/24"),
    (['--proxy-protocol', ''], r'--proxy-protocol: .* expected a network, 192.0.2.0/24'),
    (['-w', '0'], r"-w/--workers: '0': expected auto, or a number, 1 to 1024"),
    (['-w', 'x'], r"-w/--workers: 'x': expected auto, or a number, 1 to 1024"),
    (['-x', 'localhost:1080'], r'-x/--proxy: proxy URL: scheme missing, expected socks5h://localh'),
    (['-x', 'bob:x@h:1'], r'proxy URL: scheme missing, expected socks5h://HOST:PORT for example$'),
    (['-x', 'ftp://h'], r"-x/--proxy: proxy URL: scheme 'ftp', expected one of socks4,"),
    (['-x', 'socks5://::1:1080'], r'bad port, expected a number .*, IPv6 in brackets'),
    (['-x', 'socks5://bob:a/b@h'], r'bad port, .* and %2F for "/" in a password$'),
    (['--connect', 'host'], r"--connect: 'host': expected HOST:PORT"),
    (['--connect', ''], r"--connect: '': expected HOST:PORT, or \[IPV6\]:PORT"),
    (['--connect', 'http://h/'], r"--connect: 'http://h/': expected HOST:PORT"),
    (['--connect', 'h:1', '--resolve', 'i'], r'--connect, --resolve, --run: expected only one'),
    (['--check', '--connect', 'h:1'], r'--check, --connect, .*: expected only one of them'),
    (['-x', 'http://i', '--run', '/nowhere/x'], r'--run: there is no Python script /nowhere/x'),
    (['-x', 'http://i', '--run', '-m', 'no.where'], r'--run: there is no module no.where'),
    (['-x', 'http://i', '--run', sys.executable], r'--run: .* is not a Python script: '),
    (['--resolve', 'h', '-x', 'http://i'], r'--resolve: expected a SOCKS proxy, -x URL'),
    (['--run', 'x'], r'--run: expected a proxy, ALL_PROXY or -x URL before --run'),
    (['-x', 'http://i', '--run'], r'--run: expected a Python script, or -m and a module'),
    (['--prefer', 'x'], r"--prefer: 'x': expected 4 or 6"),
    (['--prefer', '5'], r"--prefer: '5': expected 4 or 6"),
    # A variable of a shell script that is not set must not stand for no rules, users, or TLS.
    *(([option, '', '--check'], rf"{option}: '': expected a value") for option in (
        '--users', '--rules', '--tls-cert', '--tls-key', '--tls-client-ca', '--keytab',
        '--proxy-file', '--log-file', '--resolve')),
    (['--tls-key', 'f'], r'--tls-key, --tls-client-ca, --udp-over-plain: expected --tls-cert'),
    (['--gssapi-nec'], r'--gssapi-level, --gssapi-nec, --keytab: expected --gssapi'),
    (['--gssapi-level', 'clear'], r'--gssapi-level, --gssapi-nec, --keytab: expected --gssapi'),
    (['--gssapi-level', 'none'], r"'none': expected some of clear, integrity, confidentiality"),
    (['--log-format', 'xml'], r"--log-format: invalid choice: 'xml'"),
    (['-b', 'unix:'], r"-b/--bind: 'unix:': expected unix:PATH"),
    (['--unix-mode', '8'], r"--unix-mode: '8': expected three octal digits, 660 for example"),
    (['--unix-mode', '1777'], r"--unix-mode: '1777': expected three octal digits"),
]


def in_process(*arguments, data=b'', **environment):
    """Exit status, stdout and stderr of main() in this process; for what ends without serving."""
    out, err, stdin = io.StringIO(), io.StringIO(), io.TextIOWrapper(io.BytesIO(data))
    root, kept = logging.root, {name: getattr(logging, name) for name in (
        '_srcfile', 'logThreads', 'logProcesses', 'logMultiprocessing')}
    patch, level = unittest.mock.patch, root.level
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            patch.object(sys, 'stdin', stdin), patch.dict(os.environ, environment), \
            patch.object(root, 'handlers', []), patch.multiple(logging, **kept):
        try:
            status = socks.main(list(arguments))
        except SystemExit as error:
            status = error.code
        finally:
            root.setLevel(level)
    return status, out.getvalue(), err.getvalue()


class CommandLineTest(Case):

    def test_serves_and_stops(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with Program(command=(sys.executable, SCRIPT)) as program, \
                    Peer(program.address) as peer:
                self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))
                self.assertEqual(program.stop(number), 0)
            self.assertIn(f'INFO listening on 127.0.0.1:{program.port}', program.log)
            self.assertNotIn('Traceback', program.log)

    def test_http_and_unix_settings(self):
        for arguments, expected in (([], (True, None)), (['--no-http'], (False, None)),
                                    (['--unix-mode', '0660'], (True, 0o660))):
            args = socks.build_parser().parse_args(arguments)
            settings = socks.settings_from(args, {})
            self.assertEqual((settings.http, settings.unix_mode), expected)

    def test_wrong_usage(self):
        more, script = [], self.write('script', 'pass')
        os.chmod(script, 0)
        if os.name == 'posix' and os.geteuid():         # root can read all files
            more = [(['-x', 'http://i', '--run', script], 'no Python script .*cannot be read$')]
        for arguments, message in WRONG_USAGE + more:
            with self.subTest(arguments):
                status, out, err = in_process(*arguments, ALL_PROXY='', all_proxy='')
                self.assertEqual((status, out), (2, ''))
                self.assertRegex(err.splitlines()[-1], message)

    def test_cannot_start(self):
        with socks.Server(('127.0.0.1', 0)) as server, Echo() as other:
            for arguments, message in [
                    (['-p', str(server.server_address.port)], 'Address already in use'),
                    (['-p', '0', '--udp-port', str(other.address.port)],
                     f'--udp-port: cannot listen on {other.address}: Address already in use'),
                    (['-b', '203.0.113.1', '--open'], 'Cannot assign requested address'),
                    (['-b', '127.0.0.1:0', '-b', '203.0.113.1', '--open'], '203.0.113.1:1080: '),
                    (['-b', '127.0.0.1:0', '-b', '127.0.0.1:0', '-p', '0'], 'already in use'),
                    (['--source', '203.0.113.1'], 'connect from 203.0.113.1: not an'),
                    (['--log-file', '/nowhere/log'], '--log-file /nowhere/log: No such file'),
                    (['-b', 'nowhere.invalid'], 'nowhere.invalid is never resolved')]:
                with self.subTest(arguments):
                    status, out, err = in_process(*arguments)
                    self.assertEqual((status, out), (1, ''))
                    self.assertRegex(err, f'^socks.py: .*{message}.*\n$')

    def test_users(self):
        with Program('-u', 'eve:a:b', SOCKS_USERS='bob:secret  carl:s') as program:
            for name, password, status in [(b'bob', b'secret', 0), (b'eve', b'a:b', 0),
                                           (b'carl', b's', 0), (b'bob', b'', 1)]:
                with self.subTest(name), Peer(program.address) as peer:
                    self.assertEqual(peer.ask(Greeting(b'\2'), Choice), Choice(2))
                    self.assertEqual(peer.ask(Credentials(name, password), Verdict).status, status)
        self.assertIn('WARNING -u shows passwords', program.log)
        self.assertNotIn('secret', program.log)

    def test_chain(self):
        """Of -x, of a file, of the environment; the log says where it leads."""
        origin = self.origin(echo)
        server = self.enter(socks.Server(('127.0.0.1', 0)).start())
        url = f'bob:secret@{server.server_address}'
        path = self.write('proxies', f'# first\nsocks5h://{url}\nsocks5h://{url}\n')
        for arguments, environment, hops in (
                (('-x', f'socks5h://{url}'), {'SOCKS_PROXY': 'http://192.0.2.1'}, 1),
                (('--proxy-file', path), {'SOCKS_PROXY': 'http://192.0.2.1'}, 2),
                ((), {'SOCKS_PROXY': f'socks5h://{url} socks5h://{url}\n'}, 2)):
            with self.subTest(arguments), Program(*arguments, **environment) as program:
                with Peer(program.address) as peer:
                    server.lines = []
                    self.assertEqual(peer.connect('127.0.0.1', origin.port).reply, 0)
                    self.assertEqual(len(server.clients), hops)
                self.assertEqual(program.stop(), 0)
            where = ', then '.join([str(server.server_address)] * hops)
            self.assertIn(f'INFO through {where}\n', program.log)
            self.assertEqual('WARNING -x shows passwords' in program.log, bool(
                arguments[:1] == ('-x',)))
            self.assertNotIn('secret', program.log)

    def test_wrong_chains(self):
        for arguments, environment, status, text in (
                ((), {'SOCKS_PROXY': 'ftp://h'}, 2, 'SOCKS_PROXY: proxy URL: scheme'),
                (('-x', 'http://h', '--proxy-file', 'f'), {}, 2, '--proxy-file: expected only one'),
                (('--proxy-file', '/nowhere'), {}, 1, '--proxy-file /nowhere: No such file'),
                (('--proxy-file', '/dev/null'), {}, 1, '--proxy-file /dev/null: expected at lea')):
            with self.subTest(arguments):
                found, _, err = in_process('--check', *arguments, **environment)
                self.assertEqual(found, status)
                self.assertIn(text, err.splitlines()[-1])

    def test_wrong_users_in_the_environment(self):
        for users in ('hunter2', 'bob:hunter2 carl:'):
            status, _, err = in_process(SOCKS_USERS=users)
            self.assertEqual(status, 2)
            self.assertIn('SOCKS_USERS: expected NAME:PASSWORD', err)
            self.assertNotIn('hunter2', err)

    def test_a_proxy_in_the_environment_that_is_wrong(self):
        status, _, err = in_process('--connect', 'a:1', ALL_PROXY='127.0.0.1:1080', NO_PROXY='')
        self.assertEqual(status, 2)
        self.assertIn('error: ALL_PROXY: proxy URL: scheme', err)

    def test_stdout_that_nobody_reads(self):
        """One line says so, and the server serves."""
        full, nothing = self.enter(open('/dev/full', 'w')), self.enter(open(os.devnull))
        for arguments, text, status in (
                (['-p', str(unused_port())], '', 0), (['-p', '0'], 'stdout: No space', 0),
                (['--hash-password'], 'expected a password', 1)):
            process = subprocess.Popen(socks_py(*arguments), stdin=nothing, stdout=full,
                                       stderr=subprocess.PIPE, universal_newlines=True)
            with self.subTest(arguments), process:
                if not status:
                    lines = iter(process.stderr.readline, '')
                    line = next(line for line in lines if not line.startswith('socks.py: '))
                    self.assertIn('INFO listening on', line)
                    process.terminate()
                err = process.stderr.read()
                self.assertEqual(process.wait(PATIENCE), status)
                self.assertNotIn('Traceback', err)

    def test_settings(self):
        """Each option that is a setting arrives there; without options there are the defaults."""
        def settings(*arguments):
            return socks.settings_from(socks.build_parser().parse_args(arguments), {})

        self.assertEqual(settings(), Settings())
        for arguments, expected in [
                ('--open', {'open': True}), ('--max-clients 7', {'max_clients': 7}),
                ('--tor-extensions', {'tor_extensions': True}),
                ('--udp-strict', {'udp_strict': True}),
                ('--source ::1 --source 127.0.0.1', {'source': ('::1', '127.0.0.1')}),
                ('--source fe80::1%eth0', {'source': ('fe80::1%eth0',)}),
                ('--advertise 192.0.2.1', {'advertise': ('192.0.2.1',)}),
                ('--udp-ports 5-9', {'udp_ports': (5, 9)}),
                ('--udp-ports 5', {'udp_ports': (5, 5)}), ('--udp-port 5', {'udp_port': 5}),
                ('--handshake-timeout 1', {'handshake_timeout': 1}),
                ('--connect-timeout 2.5', {'connect_timeout': 2.5}),
                ('--bind-timeout 3', {'bind_timeout': 3}),
                ('--idle-timeout 4', {'idle_timeout': 4}),
                ('--udp-timeout 0', {'udp_timeout': 0}), ('--drain 5', {'drain_timeout': 5}),
                ('--max-per-client 8', {'max_per_client': 8}),
                ('--max-handshakes 9', {'max_handshakes': 9}), ('--ident', {'ident': True}),
                ('--from 10.0.0.0/8 --from ::1', {'clients': tuple(
                    map(socks.parse_network, ('10.0.0.0/8', '::1')))}),
                ('--trust 10.0.0.1', {'trusted': (socks.parse_network('10.0.0.1'),)}),
                ('--proxy-protocol 10.0.0.1', {'balancers': (socks.parse_network('10.0.0.1'),)}),
                ('-x socks4://h -x http://i', {'upstream': (
                    (1, 'h', None, False, None, None), (3, 'i', None, True, None, None))}),
                ('--gssapi', {'gssapi': (1, 2)}),
                ('--gssapi --gssapi-level clear --gssapi-nec',
                 {'gssapi': (0,), 'gssapi_nec': True}),
                ('-u bob:x', {'users': {b'bob': b'x'}})]:
            with self.subTest(arguments):
                self.assertEqual(settings(*arguments.split()), Settings()._replace(**expected))

    def test_version_and_help(self):
        self.assertEqual(in_process('-V'), (0, f'socks.py {socks.__version__}\n', ''))
        status, out, _ = in_process('--help')
        self.assertEqual(status, 0)
        for line in out.splitlines():
            self.assertLess(len(line), 100)

    def test_log_levels(self):
        for arguments, expected in (['-q'], False), ([], True), (['-v'], True):
            with Program(*arguments) as program, Peer(program.address) as peer:
                peer.connect('127.0.0.1', self.refused_port())
                peer.sock.close()
                program.stop()
            self.assertEqual('failed: Connection refused' in program.log, expected)
            self.assertEqual('dialling 127.0.0.1:' in program.log, arguments == ['-v'])

    @unittest.skipUnless(socks.resource, 'no limit of open files on this system')
    def test_descriptors_run_out(self):
        """64 of them for 200 clients: the server idles, its tunnels live, and it recovers."""
        origin, limit = self.origin(echo), ('sh', '-c', 'ulimit -n 64; exec "$0" "$@"')
        with Program(prefix=limit) as one, \
                Program('--max-clients', '1000', prefix=limit) as other, \
                contextlib.ExitStack() as clients:
            tunnels = []
            for program in (one, other):
                tunnels.append(clients.enter_context(Peer(program.address)))
                self.assertEqual(tunnels[-1].connect('127.0.0.1', origin.port).reply, 0)
                for _ in range(200):
                    clients.enter_context(Peer(program.address)).send(b'\5')
            time.sleep(0.2)
            before = [cpu_seconds(program.process.pid) for program in (one, other)]
            time.sleep(0.4)
            for program, tunnel, used in zip((one, other), tunnels, before):
                self.assertLess(cpu_seconds(program.process.pid) - used, 0.1)
                tunnel.send(b'alive')
                self.assertEqual(tunnel.read(5), b'alive')
            clients.close()
            for program in (one, other):
                eventually(lambda: self.serves(program, origin))
        for program in (one, other):
            self.assertLess(program.log.count('cannot accept clients'), 20)

    @unittest.skipIf(resource is None, 'there is no limit of open files')
    def test_descriptors_of_associations(self):
        """Each counts as two clients; when there is no room, that is reply 1 and one warning."""
        prefix = ('sh', '-c', 'ulimit -n 128; exec "$0" "$@"')
        with self.origin(echo) as origin, Program(prefix=prefix) as program, \
                contextlib.ExitStack() as stack, Echo() as target:
            server = argparse.Namespace(server_address=Address(*program.address))
            stack.enter_context(Peer(program.address))
            for _ in range(7):
                client = stack.enter_context(Associate(server))
                client.ask(Datagram(target.address, b'x').pack())
            for _ in range(2):          # there is room for one more client
                with Associate(server) as client:
                    self.assertEqual(client.response.reply, Reply.GENERAL_FAILURE)
                with Peer(program.address) as peer:
                    self.assertEqual(peer.connect('localhost', origin.port).reply, 0)
        self.assertEqual(program.log.count('failed: Too many open files'), 2, program.log)
        self.assertEqual(program.log.count('WARNING'), 1, program.log)

    def serves(self, program, origin):
        with Peer(program.address) as peer:
            return peer.connect('127.0.0.1', origin.port).reply == 0


def options_for_readme():
    """The options by group, with the names of their values and with numbers that are defaults."""
    text = ''
    for group in socks.build_parser()._action_groups:
        words = []
        for option in group._group_actions:
            words.append(' '.join(option.option_strings))
            if option.nargs != 0:
                words[-1] += f' {option.metavar or "|".join(option.choices)}'
            if option.default and type(option.default) in (int, float):
                words[-1] += f' ({option.default:g})'
        if words and words[0] != '-h --help':
            words = '  '.join(word.replace(' ', '\0') for word in words)
            text += textwrap.fill(words, 118, initial_indent=f'{group.title.partition(",")[0]:23}',
                                  subsequent_indent=23 * ' ', break_on_hyphens=False) + '\n'
    return text.replace('\0', ' ')


def write_options():
    """Put the options that there are into the README."""
    with open(README, encoding='utf-8') as file:
        text = file.read()
    start, end = OPTIONS_IN_README.search(text).span(1)
    with open(README, 'w', encoding='utf-8') as file:
        file.write(text[:start] + options_for_readme() + text[end:])


README = os.path.join(HERE, 'README.md')
OPTIONS_IN_README = re.compile(r'^## Options\n.*?```text\n(.*?)^```$', re.DOTALL | re.MULTILINE)


class ProxiedFTP(ftplib.FTP):
    """FTP through a proxy, in passive mode, and in active mode by BIND."""
    proxy = None

    def connect(self, host, port=21, timeout=30):
        self.host, self.timeout = host, timeout
        self.sock = socks.create_connection((host, port), timeout, proxy=self.proxy)
        self.af = self.sock.family
        self.file = self.sock.makefile('r', encoding=self.encoding)
        self.welcome = self.getresp()
        return self.welcome

    def makeport(self):                 # active mode
        waiting = socks.create_server((self.host, 0), proxy=self.proxy, timeout=self.timeout)
        self.sendport(*waiting.getsockname())
        return waiting

    def ntransfercmd(self, cmd, rest=None):
        if not self.passiveserver:
            return super().ntransfercmd(cmd, rest)
        data = socks.create_connection(self.makepasv(), self.timeout, proxy=self.proxy)
        if rest is not None:
            self.sendcmd(f'REST {rest}')
        if not self.sendcmd(cmd).startswith('1'):
            data.close()
            raise ftplib.error_reply(f'{cmd}: the server sends no file')
        return data, None


class ReadmeTest(Case):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        with open(README, encoding='utf-8') as file:
            cls.text = file.read()
        cls.examples = re.findall(r'```python\n(.*?)```', cls.text, re.DOTALL)

    def test_options(self):
        """The README has the options of the parser."""
        shown = OPTIONS_IN_README.search(self.text).group(1)
        self.assertEqual(shown, options_for_readme(), 'to write them anew: '
                         'python3 -c "import test_socks; test_socks.write_options()"')

    def test_links(self):
        """Those within the README lead to headings that there are."""
        headings = {re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-')
                    for heading in re.findall(r'^##+ (.*)$', self.text, re.MULTILINE)}
        links = set(re.findall(r'\]\(#(.*?)\)', self.text))
        self.assertTrue(links)
        self.assertLessEqual(links, headings)

    def test_rules(self):
        """The rules in the README have no errors; --help and parse_rule() show the same form."""
        rules = re.findall(r'^    ((?:allow|deny) .*)$', self.text, re.MULTILINE)
        self.assertGreater(len(rules), 5)
        for rule in rules:
            with self.subTest(rule):
                socks.parse_rule(rule, 'README')
        forms = [re.search(r'allow\|deny \[.*?via [^]]*\]', text, re.DOTALL).group().split()
                 for text in (socks.EPILOG, socks.parse_rule.__doc__)]
        self.assertEqual(forms[0], forms[1])

    def test_settings(self):
        """The docstring of `Settings` has all fields, and the option of each with another name."""
        flags = {flag: action.dest for action in socks.build_parser()._actions
                 for flag in action.option_strings}
        fields = re.findall(r'^(\w+) {2,}(.*(?:\n {19}.*)*)', inspect.getdoc(socks.Settings),
                            re.MULTILINE)
        self.assertEqual([name for name, _ in fields], list(socks.Settings._fields))
        for name, text in fields:
            with self.subTest(name):
                named = re.findall(r'(?<=[( ])--?[\w-]+', text)
                self.assertLessEqual(set(named), set(flags))
                if '--' + name.replace('_', '-') not in flags:
                    self.assertTrue(named or '(no option)' in text)
                if name in flags.values():
                    self.assertIn(name, map(flags.get, ['--' + name.replace('_', '-'), *named]))

    def test_commands(self):
        """The options of all commands in the README exist."""
        known = set(re.findall(r'(?<![\w-])--?[a-zA-Z][a-z-]*', in_process('--help')[1]))
        without = self.text.replace(OPTIONS_IN_README.search(self.text).group(), '')
        commands = re.findall(r'socks\.py ((?:--?[a-zA-Z].*|$))', without)
        self.assertTrue(commands)
        for command in commands:
            command = re.split('--run|--connect|--hash-password|`| & |#', command)[0]
            named = set(re.findall(r'(?<![\w-])--?[a-zA-Z][a-z-]*', command))
            with self.subTest(command):
                self.assertLessEqual(named, known)

    def test_client(self):
        """The example prints what the target sends, through a proxy in the place of its proxy."""
        example, = (example for example in self.examples if 'pytest' not in example)
        origin = self.origin(serve_page)

        class Handler(socks.Handler):
            def do_CONNECT(self, request):
                return socket.create_connection(origin.server_address, PATIENCE)

        server = self.serve(Handler)
        self.assertIn('127.0.0.1:1080', example)
        with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
            warnings.simplefilter('error')
            exec(example.replace('127.0.0.1:1080', str(server.server_address)), {})
        self.assertIn('HTTP/1.0 200', out.getvalue())
        self.assertIn('example.org:80', self.line())

    def test_fixtures(self):
        """The examples for pytest and unittest: a request that fails, and one that is served."""
        example, = (example for example in self.examples if 'pytest' in example)
        names = {'__name__': 'example'}
        pytest = types.SimpleNamespace(fixture=lambda function: function)
        with unittest.mock.patch.dict(sys.modules, pytest=pytest):
            exec(example, names)
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(names['ProxyTest']).run(result)
        self.assertEqual((result.testsRun, result.errors + result.failures), (1, []))
        target = self.serve()
        with contextlib.contextmanager(names['proxy'])() as server:
            url = f'socks5h://bob:secret@{server.server_address}'
            with socks.create_connection(target.server_address, 5, proxy=url) as sock:
                sock.sendall(b'\5\1\0')
                self.assertEqual(sock.recv(2), b'\5\0')
            line = server.lines.get(timeout=5)
            self.assertEqual((line.user, line.target, line.outcome),
                             ('bob', str(target.server_address), 'done'))

    def test_ftp(self):
        """Active FTP by create_server(); in the default mode, active and passive."""
        server, origin = self.serve(), self.origin(serve_ftp)
        for modes in (), (False,), (True,):
            with ProxiedFTP() as ftp:
                ftp.proxy = f'socks5h://{server.server_address}'
                ftp.connect('127.0.0.1', origin.port)
                ftp.login()
                for mode in modes:
                    ftp.set_pasv(mode)
                parts = []
                ftp.retrbinary('RETR file', parts.append)
                self.assertEqual(b''.join(parts), b'by FTP' * 50000)
                ftp.retrbinary('RETR file', parts.append, rest=0)
            eventually(lambda: not server.clients)


# --------------------------------------------------------------------------------- foreign programs

class Page(http.server.BaseHTTPRequestHandler):
    """GET gives what stands in `pages`, by path."""
    pages = {'/': b'hello\n',
             '/large': random_bytes(random.Random(3), 1 << 20)}

    def do_GET(self):
        page = self.pages[self.path]
        self.send_response(200)
        self.send_header('Content-Length', str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args):
        pass


def serve_page(peer):
    """An HTTP server, as the function of an `Origin`."""
    Page(peer.sock, peer.sock.getpeername(), None)


class ForeignTest(Case):

    def setUp(self):
        super().setUp()
        self.site = self.origin(serve_page)
        if HAS_IPV6:
            self.origin(serve_page, host='::1', port=self.site.port)
        self.url = f'http://127.0.0.1:{self.site.port}/'

    def curl(self, server, *arguments):
        """Exit status and output."""
        proxy = str(server.server_address)
        done = run('curl', '-sS', '--noproxy', '', '-m', '20',
                   *(argument.replace('PROXY', proxy) for argument in arguments))
        return done.returncode, done.stdout

    @needs('curl')
    def test_curl(self):
        server = self.serve()
        for option in ('--socks4', '--socks4a', '--socks5', '--socks5-hostname'):
            for host in ('127.0.0.1', 'localhost', '[::1]'):
                if (option, host) == ('--socks4', '[::1]'):
                    continue                    # SOCKS4 has no IPv6
                if host == '[::1]' and not HAS_IPV6:
                    continue
                with self.subTest(option, host=host):
                    self.assertEqual(self.curl(server, option, 'PROXY',
                                               f'http://{host}:{self.site.port}/'), (0, 'hello\n'))

    @needs('curl')
    def test_curl_failures(self):
        server = self.serve()
        for option, url in (('--socks5', f'http://127.0.0.1:{self.refused_port()}/'),
                            ('--socks4a', 'http://nowhere.invalid/'),
                            ('--socks5-hostname', 'http://nowhere.invalid/')):
            self.assertEqual(self.curl(server, option, 'PROXY', url), (97, ''))

    @needs('curl')
    def test_curl_password(self):
        server = self.serve(users=USERS)
        for option in ('--socks5', '--socks5-hostname'):
            for user, expected in (('bob:secret', (0, 'hello\n')), ('用户:密码', (0, 'hello\n')),
                                   ('bob:wrong', (97, '')), ('bob:', (97, ''))):
                with self.subTest(option, user=user):
                    self.assertEqual(self.curl(server, option, 'PROXY', '--proxy-user', user,
                                               self.url), expected)
            self.assertEqual(self.curl(server, option, 'PROXY', self.url), (97, ''))
        self.assertEqual(self.curl(server, '--socks4', 'PROXY', self.url)[0], 97)
        self.assertEqual(self.curl(self.serve(), '--socks5', 'PROXY', '-U', 'any:body', self.url),
                         (0, 'hello\n'))

    @needs('curl')
    def test_curl_parallel(self):
        """50 downloads at once, each complete."""
        server = self.serve()
        names = [self.place(str(number)) for number in range(50)]
        outputs = [word for name in names for word in ('-o', name, self.url + 'large')]
        self.assertEqual(self.curl(server, '-Z', '--parallel-immediate', '--parallel-max', '50',
                                   '--socks5', 'PROXY', *outputs), (0, ''))
        for name in names:
            with open(name, 'rb') as file:
                self.assertEqual(file.read(), Page.pages['/large'])

    @needs('curl')
    def test_curl_as_http_proxy(self):
        """In all its ways, with the right password and a wrong one."""
        cert = self.write('cert', CERTIFICATE)
        server, within_tls = self.serve(users=USERS), self.serve(users=USERS, tls=server_context())
        port = within_tls.server_address.port
        for options in (['-x', 'http://PROXY'], ['-x', 'http://PROXY', '-p'],
                        ['--proxy1.0', 'PROXY'],
                        ['-x', 'http://PROXY', '--proxy-anyauth'],
                        ['-x', 'http://PROXY', '--proxy-anyauth', '-p'],
                        ['-x', f'https://localhost:{port}', '--proxy-cacert', cert]):
            with self.subTest(options):
                self.assertEqual(self.curl(server, *options, '-U', 'bob:secret', self.url,
                                           self.url),
                                 (0, 'hello\n' * 2))
                _, output = self.curl(server, *options, '-U', 'bob:bad', '-w', '%{http_connect}',
                                      self.url)
                self.assertRegex(output, 'wrong user name or password|^407$')
        for method in ('ntlm', 'digest'):
            status, output = self.curl(server, '-x', 'http://PROXY', '-U', 'bob:secret',
                                       f'--proxy-{method}', self.url)
            if (method, status) != ('ntlm', 2):         # this curl has no NTLM
                self.assertIn('expected Basic', output)

    @needs('curl')
    @unittest.skipUnless(hasattr(socket, 'AF_UNIX'), 'no unix sockets here')
    def test_curl_by_unix_socket(self):
        path = self.place('socket')
        self.enter(socks.Server((f'unix:{path}', 0)).start())
        status, output = self.curl(self.serve(), '-x', f'socks5h://localhost{path}', self.url)
        if status == 5:                 # it took all of that for a name
            self.skipTest('this curl has no unix sockets for proxies')
        self.assertEqual((status, output), (0, 'hello\n'))

    @needs('wget')
    def test_wget(self):
        for server, user in ((self.serve(), ''), (self.serve(users=USERS), 'bob:secret@')):
            done = run('wget', '-q', '-O', '-', self.url, env=dict(
                os.environ, http_proxy=f'http://{user}{server.server_address}', no_proxy=''))
            self.assertEqual((done.returncode, done.stdout), (0, 'hello\n'))

    def test_urllib(self):
        for server, user in ((self.serve(), ''), (self.serve(users=USERS), 'bob:secret@')):
            proxies = {'http': f'http://{user}{server.server_address}'}
            opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
            with opener.open(self.url, timeout=PATIENCE) as answer:
                self.assertEqual(answer.read(), b'hello\n')

    @needs('ncat')
    def test_ncat(self):
        for server, auth in ((self.serve(), ()), (self.serve(users=USERS), ('bob:secret',))):
            for kind in ('socks4', 'socks5')[bool(auth):]:
                options = ['--proxy-auth', *auth] if auth else []
                with self.subTest(kind, auth=auth):
                    done = subprocess.run(
                        ['ncat', '--proxy-type', kind, '--proxy', str(server.server_address),
                         *options, '127.0.0.1', str(self.site.port)],
                        input=HTTP, stdout=subprocess.PIPE, timeout=20)
                    self.assertTrue(done.stdout.endswith(b'hello\n'))

    @needs('proxychains4', 'curl')
    def test_proxychains(self):
        host, port = self.serve().server_address
        for kind in ('socks4', 'socks5'):
            with self.subTest(kind), tempfile.NamedTemporaryFile('w+') as config:
                config.write(f'strict_chain\nproxy_dns\n[ProxyList]\n{kind} {host} {port}\n')
                config.flush()
                done = run('proxychains4', '-q', '-f', config.name, 'curl', '-sS', '-m', '20',
                           '--noproxy', '*', self.url)
                self.assertEqual((done.returncode, done.stdout), (0, 'hello\n'))

    # Load balancers and TLS

    @needs('haproxy', 'curl')
    def test_haproxy(self):
        """It shares the clients out, tells who they are, and goes on when a server has died."""
        rules = self.write('rules', 'allow from 127.0.0.2 to 127.0.0.0/8\n')
        origin, port = self.origin(), unused_port()
        options = '--proxy-protocol', '127.0.0.0/8', '--rules', rules
        with Program(*options) as one, Program(*options) as two:
            config = self.write('haproxy.cfg',
                                HAPROXY.format(port=port, one=one.port, two=two.port))
            with self.program(port, 'haproxy', '-db', '-f', config):
                tunnels = []
                for _ in range(4):
                    near = self.peer(('127.0.0.1', port), ('127.0.0.2', 0))
                    self.assertEqual(near.connect('127.0.0.1', origin.port).reply, 0)
                    eventually(lambda: len(origin.peers) > len(tunnels))
                    tunnels.append((near, origin.peers[-1]))
                self.assertEqual(self.peer(('127.0.0.1', port), ('127.0.0.3', 0)).connect(
                    '127.0.0.1', origin.port).reply, Reply.NOT_ALLOWED)
                url = f'http://127.0.0.1:{self.site.port}/'
                proxy = f'127.0.0.1:{port}'
                curl = ('curl', '-sS', '--noproxy', '', '--interface', '127.0.0.2', '-x',
                        f'socks5h://{proxy}', url)
                self.assertEqual(run(*curl).stdout, 'hello\n')
                one.process.kill()
                one.process.wait()
                alive = sum(self.is_alive(*tunnel) for tunnel in tunnels)
                self.assertIn(alive, (1, 2, 3))     # those of the other one
                eventually(lambda: run(*curl).stdout == 'hello\n')
                self.assertTrue(all(run(*curl).stdout == 'hello\n' for _ in range(4)))
        self.assertIn(' INFO 127.0.0.2:', two.log)
        self.assertNotIn('no request', two.log)

    @staticmethod
    def is_alive(near, far):
        """Whether a byte still comes through."""
        with contextlib.suppress(OSError, EOFError):
            far.send(b'x')
            return bool(near.read(1))
        return False

    @needs('openssl')
    def test_openssl_client(self):
        """A client of plain SOCKS behind `openssl s_client`, with and without a certificate."""
        path = self.write('both', KEY + CERTIFICATE)
        server = self.serve(tls=socks.tls_context(path, client_ca=path))
        for options, expected in (('-cert', path), b'\5\0\5\0\0\1'), ((), b''):
            process = self.enter(subprocess.Popen(
                ['openssl', 's_client', '-quiet', '-connect', str(server.server_address), *options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(Greeting(b'\0').pack() + Request(
                    1, Address('127.0.0.1', self.site.port)).pack() + HTTP)
                process.stdin.flush()
            self.assertEqual(process.stdout.read(6), expected)
            self.assertEqual(process.stdout.read()[-6:], b'hello\n' if expected else b'')
        eventually(lambda: any(' localhost SOCKS5 CONNECT' in line for line in self.lines))

    # ssh, in front of us and behind us

    def account(self):
        """The passwd entry of this user."""
        try:
            return pwd.getpwuid(os.getuid())
        except KeyError:
            return self.skipTest('this user has no passwd entry')

    def sshd(self):
        """The beginning of an ssh command for a server that runs until the end of the test."""
        if os.path.basename(self.account().pw_shell) in ('nologin', 'false'):
            self.skipTest('this user cannot log in')
        key = self.place('key')
        run('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key, check=True)
        port = unused_port()
        daemon = self.enter(subprocess.Popen(
            [shutil.which('sshd'), '-D', '-e', '-f', '/dev/null', '-h', key, '-p', str(port),
             '-o', 'ListenAddress=127.0.0.1', '-o', f'AuthorizedKeysFile={key}.pub',
             '-o', 'StrictModes=no', '-o', 'PidFile=none'], stderr=subprocess.PIPE))
        self.addCleanup(daemon.terminate)
        self.assertIn(b'listening', daemon.stderr.readline())
        return ['ssh', '-F', '/dev/null', '-i', key, '-p', str(port), '-o', 'BatchMode=yes',
                '-o', 'StrictHostKeyChecking=no', '-o', 'UserKnownHostsFile=/dev/null',
                '-o', 'LogLevel=ERROR']

    @needs('ssh', 'sshd', 'ssh-keygen', 'nc')
    def test_ssh(self):
        """As people write it in ~/.ssh/config: through OpenBSD's nc, or through ourselves."""
        server, ssh = self.serve(), self.sshd()
        proxy = server.server_address
        for command in (f'nc -X 5 -x {proxy} %h %p', f'nc -X 4 -x {proxy} %h %p',
                        f'{sys.executable} {HERE}/socks.py -x socks5h://{proxy} --connect %h:%p'):
            with self.subTest(command):
                done = run(*ssh, '-o', f'ProxyCommand={command}', '127.0.0.1',
                           'head -c 3000000 /dev/zero | wc -c')
                self.assertEqual(done.stdout.strip(), '3000000', done.stderr)

    @contextlib.contextmanager
    def program(self, port, *command):
        """A server program that listens on `port`."""
        with subprocess.Popen(command, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE) as process:
            try:
                eventually(lambda: process.poll() is not None or listens(port))
                self.assertIsNone(process.poll(), process.returncode and process.stderr.read())
                yield port
            finally:
                self.end(process)

    @staticmethod
    def end(process):
        while process.poll() is None:   # danted misses a signal now and then
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=1)

    def fetch(self, *proxy, host='127.0.0.1', copes=True):
        """A page, by our client through others' servers: message by message, and at once."""
        for optimistic in (False, True, True) if copes else (False,):
            with socks.create_connection((host, self.site.port), PATIENCE, proxy=[*proxy],
                                         optimistic=optimistic, data=HTTP) as sock:
                self.assertEqual(Peer(sock).rest()[-6:], b'hello\n')
        self.assertEqual({*socks.Flight.known.values(), 0}, {0})

    def dante(self):
        self.account()                  # danted asks for it
        port = unused_port()
        path = self.write('danted.conf', DANTE % port)
        return self.enter(self.program(port, 'danted', '-f', path, '-p', path + '.pid'))

    @needs('danted')
    def test_our_client_through_dante(self):
        proxy = f'127.0.0.1:{self.dante()}'
        self.fetch(f'socks5h://{proxy}', host='localhost')
        self.fetch(f'socks4://{proxy}')
        with self.assertRaises(socks.SOCKS5Error) as caught:
            socks.create_connection(('127.0.0.1', self.refused_port()), proxy=f'socks5://{proxy}')
        self.assertEqual(caught.exception.errno, errno.ECONNREFUSED)
        with socks.create_server(('127.0.0.1', 0), proxy=f'socks5://{proxy}',
                                 timeout=PATIENCE) as waiting:
            with self.peer(waiting.getsockname()) as peer:
                sock, address = waiting.accept()
                with sock:
                    self.assertEqual(address, peer.sock.getsockname())
                    peer.send(b'hello')
                    self.assertEqual(sock.recv(5, socket.MSG_WAITALL), b'hello')
        target = self.enter(Echo())
        with socks.socksocket(type=socket.SOCK_DGRAM, proxy=f'socks5://{proxy}') as sock:
            sock.settimeout(PATIENCE)
            sock.sendto(b'x', target.address)
            self.assertEqual(sock.recvfrom(10), (b'E:x', tuple(target.address)))

    @needs('danted', 'microsocks', 'ssh', 'sshd', 'ssh-keygen')
    def test_our_client_through_microsocks_and_ssh(self):
        """And through a chain of three different servers."""
        port = unused_port()
        with self.program(port, 'microsocks', '-i', '127.0.0.1', '-p', str(port), '-u', 'bob',
                          '-P', 's'):
            microsocks = f'socks5h://bob:s@127.0.0.1:{port}'
            self.fetch(microsocks, host='localhost', copes=False)
            with self.assertRaises(socks.SOCKS5AuthError):
                self.fetch(f'socks5h://bob:t@127.0.0.1:{port}')
            forward = unused_port()
            with self.program(forward, *self.sshd(), '-N', '-D', f'127.0.0.1:{forward}',
                              '127.0.0.1'):
                for scheme in ('socks4', 'socks4a', 'socks5', 'socks5h'):
                    self.fetch(f'{scheme}://127.0.0.1:{forward}', host='localhost')
                self.fetch(microsocks, f'socks5h://127.0.0.1:{forward}',
                           f'socks5h://127.0.0.1:{self.dante()}', host='localhost', copes=False)
            self.addCleanup(setattr, socks.Flight, 'PATIENCE', socks.Flight.PATIENCE)
            self.addCleanup(socks.Flight.known.clear)
            socks.Flight.PATIENCE = 0.2
            for _ in range(2):
                with socks.create_connection(('127.0.0.1', self.site.port), PATIENCE, data=HTTP,
                                             proxy=microsocks + '?optimistic=1') as sock:
                    self.assertEqual(Peer(sock).rest()[-6:], b'hello\n')

    # BIND and UDP

    @needs('socksify', 'curl')
    def test_active_ftp(self):
        """curl fetches a file by active-mode FTP: the server connects to where BIND listens."""
        with self.socksify() as run_socksified:
            url = f'ftp://u:p@127.0.0.1:{self.origin(serve_ftp).port}/file'
            for _ in range(3):          # now and then socksify gives curl no peer address
                done = run_socksified('curl', '-sS', '-m', '20', '-P', '-', url)
                if 'inet_ntop() failed' not in done.stderr:
                    break
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertEqual(done.stdout, 'by FTP' * 50000)
        eventually(lambda: any('BIND' in line and '300000 down' in line for line in self.lines))

    @needs('socksify')
    def test_dns_query(self):
        """A program that asks a name server, without knowing that a proxy is in between."""
        query = hexed('1234 0100 0001 0000 0000 0000 04 74657374 00 0001 0001')
        program = (f'import socket; sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);'
                   f'sock.settimeout(10); sock.sendto({query!r}, ("127.0.0.1", %d));'
                   f'print(sock.recvfrom(512))')
        with self.socksify() as run_socksified, Echo(prefix=b'') as server:
            done = run_socksified(sys.executable, '-c', program % server.address.port)
            self.assertEqual(done.stdout, f'{(query, tuple(server.address))!r}\n')
        self.assertIn('UDP_ASSOCIATE', self.line())

    @contextlib.contextmanager
    def socksify(self):
        """A function like run() under Dante's client, with a new server of ours."""
        host, port = self.serve().server_address
        with tempfile.NamedTemporaryFile('w') as config:
            config.write(f'route {{ from: 0.0.0.0/0 to: 0.0.0.0/0 via: {host} port = {port}\n'
                         'proxyprotocol: socks_v5\n method: none\n protocol: tcp udp\n'
                         'command: connect bind udpassociate bindreply }')
            config.flush()
            environment = dict(os.environ, SOCKS_CONF=config.name, SOCKS_AUTOADD_LANROUTES='no')
            yield lambda *command: run('socksify', *command, env=environment)

    @needs('perl')
    def test_perl(self):
        """IO::Socket::Socks: SOCKS4 and 5 CONNECT, BIND, UDP."""
        if run('perl', '-MIO::Socket::Socks', '-e', '1').returncode:
            self.skipTest('not installed: IO::Socket::Socks')
        target, echo = self.origin(lambda peer: peer.send(b'hello')), self.enter(Echo())
        done = run('perl', '-e', PERL, *map(str, (
            *self.serve().server_address, target.port, echo.address.port)))
        self.assertEqual((done.stdout, done.stderr),
                         ('4 hello\n5 hello\nBIND hello\nUDP E:perl\n', ''))

    @needs('tor-resolve')
    def test_tor_resolve(self):
        proxy = str(self.serve(tor_extensions=True).server_address)
        for arguments, output in (
                (['localhost'], '127.0.0.1\n'), (['-4', 'localhost'], '127.0.0.1\n'),
                (['-x', '127.0.0.1'], 'localhost\n'), (['a.invalid'], '')):
            done = run('tor-resolve', *arguments, proxy)
            self.assertEqual((done.returncode, done.stdout), (0 if output else 1, output))

    @needs('torsocks', 'curl', 'unshare', 'ip')
    def test_torsocks(self):
        """In a namespace where a name stands for an address that is ours, but not loopback."""
        script = ('ip link set lo up; ip address add 198.51.100.1/32 dev lo;'
                  'mount --bind "$1" /etc/hosts; exec "$0" -m test_socks InsideTorsocks')
        if run('unshare', '-rnm', 'true').returncode:
            self.skipTest('this user cannot make namespaces')
        with tempfile.NamedTemporaryFile('w') as hosts:
            hosts.write('127.0.0.1 localhost\n198.51.100.1 site.example\n')
            hosts.flush()
            done = run('unshare', '-rnm', 'sh', '-ec', script, sys.executable, hosts.name, cwd=HERE)
        self.assertEqual(done.returncode, 0, done.stderr)


class InsideTorsocks(Case):
    """In the namespace that test_torsocks makes."""

    def test(self):
        host, port = self.serve(tor_extensions=True).server_address
        site = self.origin(serve_page, host='198.51.100.1')
        done = run('torsocks', '-a', host, '-P', str(port), 'curl', '-sS', '-m', '20',
                   f'http://site.example:{site.port}/')
        self.assertEqual(done.stdout, 'hello\n', done.stderr)
        self.assertTrue(any('RESOLVE site.example' in line for line in self.lines))


HAPROXY = '''
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    retries 3
    option redispatch
listen socks
    bind 127.0.0.1:{port}
    balance roundrobin
    server one 127.0.0.1:{one} send-proxy-v2 check check-send-proxy inter 200ms fall 1
    server two 127.0.0.1:{two} send-proxy-v2 check check-send-proxy inter 200ms fall 1
'''

DANTE = '''
logoutput: /dev/null
errorlog: stderr
internal: 127.0.0.1 port = %d
external: lo
clientmethod: none
socksmethod: none
user.unprivileged: nobody
client pass { from: 127.0.0.0/8 to: 0.0.0.0/0 }
socks pass { from: 0/0 to: 0/0
  command: bind connect udpassociate bindreply udpreply
  protocol: tcp udp }
'''


def serve_ftp(peer):
    """An FTP server for one file, in active and passive mode."""
    listener = None
    answers = {b'USER': b'331 password', b'PASS': b'230 in', b'PWD': b'257 "/"', b'TYPE': b'200 ok',
               b'SIZE': b'213 300000', b'REST': b'350 from there', b'QUIT': b'221 bye'}
    peer.send(b'220 ready\r\n')
    for line in peer.sock.makefile('rb'):
        command, _, argument = line.strip().partition(b' ')
        if command == b'EPRT':
            _, _, host, port, _ = argument.decode().split('|')
            answer = b'200 ok'
        elif command == b'PORT':
            *ip, high, low = argument.decode().split(',')
            host, port = '.'.join(ip), int(high) * 256 + int(low)
            answer = b'200 ok'
        elif command in (b'EPSV', b'PASV'):
            listener = socket.socket()
            listener.bind(('127.0.0.1', 0))
            listener.listen(1)
            port = listener.getsockname()[1]
            answer = (b'229 go on (|||%d|)' % port if command == b'EPSV' else
                      b'227 go on (127,0,0,1,%d,%d)' % divmod(port, 256))
        elif command == b'RETR':
            peer.send(b'150 here it comes\r\n')
            with Peer(listener.accept()[0] if listener else (host, int(port))) as data:
                data.send(b'by FTP' * 50000)
            if listener:
                listener.close()
            listener = None
            answer = b'226 done'
        else:
            answer = answers.get(command, b'502 no')
        peer.send(answer + b'\r\n')


PERL = r'''
use strict;
use Socket;
use IO::Socket::Socks qw(:constants $SOCKS_ERROR);
my ($host, $port, $tcp, $udp) = @ARGV;
my @proxy = (ProxyAddr => $host, ProxyPort => $port, Timeout => 10);
my $data;
for my $version (4, 5) {
    my $sock = IO::Socket::Socks->new(@proxy, SocksVersion => $version,
        ConnectAddr => '127.0.0.1', ConnectPort => $tcp) or die "CONNECT: $SOCKS_ERROR";
    sysread($sock, $data, 5);
    print "$version $data\n";
}
my $bound = IO::Socket::Socks->new(@proxy, SocksVersion => 5,
    BindAddr => '127.0.0.1', BindPort => $tcp) or die "BIND: $SOCKS_ERROR";
my ($h, $p) = $bound->dst;
my $caller = IO::Socket::INET->new(PeerAddr => $h, PeerPort => $p) or die "peer: $!";
$bound->accept or die "accept: $SOCKS_ERROR";
syswrite($caller, "hello");
sysread($bound, $data, 5);
print "BIND $data\n";
my $sock = IO::Socket::Socks->new(@proxy, SocksVersion => 5,
    UdpAddr => '127.0.0.1', UdpPort => 0) or die "UDP: $SOCKS_ERROR";
$sock->send("perl", 0, pack_sockaddr_in($udp, inet_aton('127.0.0.1'))) or die "send: $!";
$sock->recv($data, 100);
print "UDP $data\n";
'''


def cases():
    """All but what other tests run in a namespace that they make, by its name."""
    return [case for name, case in sorted(globals().items())
            if isinstance(case, type) and issubclass(case, unittest.TestCase)
            and not name.startswith('Inside')]


def load_tests(loader, tests, pattern):
    return unittest.TestSuite(map(loader.loadTestsFromTestCase, cases()))


class Shared(unittest.TestSuite):
    """All tests, run by several processes: each takes the next class from a pipe, writes a dot for
    each test, and sends its results to the first process at its end."""
    _cleanup = False                    # the suite itself has no tests to forget

    def __init__(self, number):
        super().__init__()
        self.number = number
        # The largest first, so that no process is left with one at the end.
        self.groups = sorted(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases()),
                             key=unittest.TestSuite.countTestCases, reverse=True)

    def countTestCases(self):
        return sum(map(unittest.TestSuite.countTestCases, self.groups))

    def __iter__(self):
        for number in iter(lambda: os.read(self.queue, 1), b''):
            yield from self.groups[number[0]]

    def run(self, result, debug=False):
        result.has_line, result.dots = False, True
        compiled()                      # once, not in each process
        self.queue, filling = os.pipe()
        os.write(filling, bytes(range(len(self.groups))))
        os.close(filling)
        ends = [self.fork(result) for _ in range(self.number)]
        os.close(self.queue)
        for pid, reading in ends:
            with open(reading) as file:
                text = file.read()
            status = os.waitpid(pid, 0)[1]
            result.take(json.loads(text) if text and not status else {
                'errors': [('a process of the tests', f'ended with {status >> 8 or -status}\n')]})
        return result

    def fork(self, result):
        """Start a process; its number, and where to read its results."""
        reading, writing = os.pipe()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            os.close(writing)
            return pid, reading
        status = 1
        try:
            os.close(reading)
            super().run(result)
            with open(writing, 'w') as file:
                json.dump(result.given(), file)
            gc.collect()                # multiprocessing removes its semaphores then
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)


class Ended(str):
    """The description of a test that another process ran."""

    def shortDescription(self):
        return None

    id = str.__str__


class Result(unittest.TextTestResult):
    """Shows on a terminal which test runs, and how many there are; elsewhere a dot for each."""
    total = 0                           # tests to run

    def __init__(self, stream, *args, **kwargs):
        super().__init__(stream, *args, **kwargs)
        self.has_line = self.dots and getattr(stream, 'isatty', lambda: False)()
        self.dots = self.dots and not self.has_line
        self.unexpected = []            # tests that were skipped though nothing should be missing

    def startTest(self, test):
        super().startTest(test)
        if self.has_line:
            text = f'{self.testsRun} of {self.total}: {test.id()}'
            columns = shutil.get_terminal_size().columns
            self.stream.write(f'\r{text[:columns - 1]:{columns - 1}}')
            self.stream.flush()

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        needed = re.match(r'needs Python 3\.(\d+)', reason)
        is_expected = (sys.version_info < (3, int(needed.group(1))) if needed else
                       re.search(os.environ.get('MAY_SKIP') or '(?!)', reason))
        if os.environ.get('CI') == 'true' and not is_expected:
            self.unexpected.append(f'{test.id()}: {reason}')

    def wasSuccessful(self):
        return super().wasSuccessful() and not self.unexpected

    LISTS = 'errors', 'failures', 'skipped', 'expectedFailures'     # of pairs (test, text)

    def given(self):
        """The results for take(), of what JSON has."""
        lists = {name: [(self.getDescription(test), text) for test, text in getattr(self, name)]
                 for name in self.LISTS}
        return dict(lists, testsRun=self.testsRun, unexpected=self.unexpected,
                    unexpectedSuccesses=[*map(self.getDescription, self.unexpectedSuccesses)])

    def take(self, given):
        """Add the results of another process."""
        for name, values in given.items():
            if name in self.LISTS:
                values = [(Ended(test), text) for test, text in values]
            elif name == 'unexpectedSuccesses':
                values = [*map(Ended, values)]
            setattr(self, name, getattr(self, name) + values)


class Runner(unittest.TextTestRunner):
    """With CI=true a skipped test is a failure, unless it needs a later Python, or the reason
    matches the regular expression in MAY_SKIP."""
    resultclass = Result

    def run(self, test):
        Result.total = test.countTestCases()
        result = super().run(test)
        for text in result.unexpected:
            print(f'must not be skipped here: {text}', file=sys.stderr)
        reasons = {reason for _, reason in result.skipped}
        missing = {name for reason in reasons if reason.startswith('not installed: ')
                   for name in reason.partition(': ')[2].split(', ')}
        if missing:
            print(f'not installed: {", ".join(sorted(missing))}', file=sys.stderr)
        for reason in sorted(reasons):
            if not reason.startswith('not installed: '):
                print(f'skipped: {reason}', file=sys.stderr)
        return result


# -------------------------------------------------------------------------------------- benchmark
#
# What this server and others that are found on PATH do with the same work, in turn.  The load runs
# in processes of its own, each of which has both ends of its connections; a step is taken with all
# of them before the next, so that it needs neither threads nor events.

FIGURES = [                             # key, title, format, whether more is better
    ('gbit_1', 'one stream, Gbit/s', '{:.1f}', True),
    ('cpu_gb_1', 'the same, CPU seconds per GB', '{:.2f}', False),
    ('gbit_8', '8 streams, Gbit/s', '{:.1f}', True),
    ('cpu_gb_8', 'the same, CPU seconds per GB', '{:.2f}', False),
    ('p50_1', 'ping-pong of 64 bytes, median, µs', '{:.0f}', False),
    ('trips_64', 'the same on 64 connections, trips/s', '{:.0f}', True),
    ('conns_64', 'connections/s, 64 at once', '{:.0f}', True),
    ('cpu_conn_64', 'the same, CPU seconds per 1,000', '{:.3f}', False),
    ('udp_16', 'UDP trips/s, 16 under way', '{:.0f}', True),
    ('cpu_udp_16', 'the same, CPU seconds per million', '{:.1f}', False),
    ('idle', 'memory of an idle tunnel, bytes', '{:.0f}', False),
    ('base', 'memory before the first, MiB', '{:.1f}', False)]
LOADERS = 8                             # processes


def listening():
    """A socket that listens on a free port."""
    sock = socket.socket()
    sock.bind(('127.0.0.1', 0))
    sock.listen(100)
    return sock


def join_all(proxy, listener, count):
    """`count` connections by way of the proxy, if there is one: the near ends, and the far ones in
    another order."""
    target = Address(*listener.getsockname())
    near = [socket.create_connection(proxy or target, PATIENCE) for _ in range(count)]
    if proxy:
        ask_all(near, Greeting(b'\0'), 2)
        ask_all(near, Request(1, target), 10)
    far = [listener.accept()[0] for _ in near]
    for sock in near + far:
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def ask_all(socks5, message, size):
    """Send a message on all connections; raise OSError if an answer, of so many bytes, says no."""
    for sock in socks5:
        sock.sendall(message.pack())
    for sock in socks5:
        answer = sock.recv(size, socket.MSG_WAITALL)
        if len(answer) < size or answer[1]:
            raise OSError(errno.ECONNREFUSED, f'answered {answer!r}')


def echo_all(near, far, data):
    for senders, receivers in (near, far), (far, near):
        for sock in senders:
            sock.sendall(data)
        for sock in receivers:
            sock.recv(len(data), socket.MSG_WAITALL)


@contextlib.contextmanager
def closing_all(*groups):
    try:
        yield
    finally:
        for sock in itertools.chain(*groups):
            sock.close()


def load_stream(proxy, seconds):
    """Bytes that one connection brings."""
    with listening() as listener:
        (near,), (far,) = join_all(proxy, listener, 1)
    thread = threading.Thread(target=send_on, args=(far,))
    thread.start()
    buffer, count, end = bytearray(1 << 20), 0, time.monotonic() + seconds
    discard = socket.MSG_TRUNC if sys.platform == 'linux' else 0        # who reads is no bottleneck
    with near:
        while time.monotonic() < end:
            count += near.recv_into(buffer, 0, discard)
    thread.join()
    return count


def send_on(sock):
    data = bytes(1 << 20)
    with sock, contextlib.suppress(OSError):
        while True:
            sock.sendall(data)


def load_trips(proxy, seconds, count):
    """The seconds that each round of trips took, with so many connections."""
    with listening() as listener:
        near, far = join_all(proxy, listener, count)
    took, data, now = [], bytes(64), time.monotonic()
    end = now + seconds
    with closing_all(near, far):
        while now < end:
            echo_all(near, far, data)
            now, before = time.monotonic(), now
            took.append(now - before)
    return took


def load_connections(proxy, seconds, count):
    """How many connections were made, a byte sent both ways, and closed; so many at once."""
    made, end = 0, time.monotonic() + seconds
    with listening() as listener:
        while time.monotonic() < end:
            near, far = join_all(proxy, listener, count)
            with closing_all(near, far):
                echo_all(near, far, b'x')
            made += count
    return made


def load_datagrams(proxy, seconds, window):
    """How many datagrams came back, of so many under way at a time."""
    near, far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with near, far, contextlib.ExitStack() as stack:
        for sock in near, far:
            sock.bind(('127.0.0.1', 0))
            sock.settimeout(0.2)
        header, relay = b'', far.getsockname()
        if proxy:
            control = stack.enter_context(Peer(proxy))
            control.ask(Greeting(b'\0'), Choice)
            header = Datagram(Address(*relay), b'').pack()
            relay = control.ask(Request(3, Address(*near.getsockname())), Response).address
        return echo_datagrams(near, far, relay, header + bytes(512), seconds, window)


def echo_datagrams(near, far, relay, data, seconds, window):
    """How many datagrams from `near` by way of the relay `far` has sent back."""
    came, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(socket.timeout):       # lost: on with the next ones
            for _ in range(window):
                near.sendto(data, relay)
            for _ in range(window):
                payload, sender = far.recvfrom(2048)
                far.sendto(payload, sender)
            for _ in range(window):
                near.recv(2048)
                came += 1
    return came


def loader_pool():
    """The processes; not by fork(), which would copy locks that some thread holds."""
    return multiprocessing.get_context('spawn').Pool(LOADERS)


def process_tree(pid):
    """The process and those below it; none where /proc does not tell."""
    pids = [pid] * os.path.exists(f'/proc/{pid}/task')
    for each in pids:
        pids += children(each)
    return pids


def memory(pids):
    """Bytes that the processes take, of shared pages their share."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f'/proc/{pid}/smaps_rollup') as file:
            total += int(re.search(r'^Pss: +(\d+)', file.read(), re.M).group(1)) << 10
    return total or float('nan')


class Contender:
    """A proxy, or the direct way; gives its figures."""
    idle = 2000                         # tunnels at once

    def __init__(self, name, command, seconds, loaders):
        self.name = name
        self._command = command         # {port} and {dante} stand for what is not known yet
        self._seconds = seconds
        self._loaders = loaders

    def run(self):
        """The figures of a new process; what it cannot do is missing."""
        if not self._command:
            return self._measure(None, None)
        port = unused_port()
        with tempfile.NamedTemporaryFile('w') as config:
            config.write(DANTE % port)
            config.flush()
            process = subprocess.Popen(
                [word.format(port=port, dante=config.name) for word in self._command],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                proxy = '127.0.0.1', port
                eventually(lambda: self._is_up(proxy))
                return self._measure(proxy, process.pid)
            finally:
                process.terminate()
                process.wait()

    @staticmethod
    def _is_up(proxy):
        with contextlib.suppress(OSError), Peer(proxy) as peer:
            return peer.ask(Greeting(b'\0'), Choice).method == 0

    def _measure(self, proxy, pid):
        self._proxy, self._pid, figures = proxy, pid, {}
        if proxy:
            figures['idle'], figures['base'] = self._idle()
        for streams in 1, 8:
            counts, cpu = self._load(streams, load_stream)
            figures[f'gbit_{streams}'] = sum(counts) * 8e-9 / self._seconds
            figures[f'cpu_gb_{streams}'] = cpu / sum(counts) * 1e9
        (took,), _ = self._load(1, load_trips, 1)
        figures['p50_1'] = statistics.median(took) * 1e6
        rounds, _ = self._load(LOADERS, load_trips, 64 // LOADERS)
        figures['trips_64'] = sum(map(len, rounds)) * (64 // LOADERS) / self._seconds
        counts, cpu = self._load(LOADERS, load_connections, 64 // LOADERS)
        figures['conns_64'] = sum(counts) / self._seconds
        figures['cpu_conn_64'] = cpu / sum(counts) * 1000
        with contextlib.suppress(OSError, EOFError, socks.ProxyError):
            (count,), cpu = self._load(1, load_datagrams, 16)
            figures['udp_16'] = count / self._seconds
            figures['cpu_udp_16'] = cpu / count * 1e6
        return {key: value for key, value in figures.items() if value == value}

    def _load(self, size, function, *args):
        """What each of so many loaders brought, and the CPU seconds that it cost the proxy."""
        before = cpu_seconds(*process_tree(self._pid))
        results = self._loaders.starmap(
            function, [(self._proxy, self._seconds, *args)] * size, chunksize=1)
        return results, cpu_seconds(*process_tree(self._pid)) - before

    def _idle(self):
        """Bytes of memory for one more idle tunnel, and MiB before the first."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else 500
        count, sizes = min(self.idle, (limit - 100) // 2) // 50, []
        with listening() as listener, contextlib.ExitStack() as stack:
            for _ in range(count):
                sizes.append(memory(process_tree(self._pid)))
                stack.enter_context(closing_all(*join_all(self._proxy, listener, 50)))
        return (sizes[-1] - sizes[1]) / ((count - 2) * 50), sizes[0] / (1 << 20)


def contenders(more, seconds, loaders):
    """The direct way, this server, and others that are there or are given as NAME=COMMAND."""
    ours = [sys.executable, os.path.join(HERE, 'socks.py'), '-p', '{port}']
    commands = [('direct', None), ('socks.py', ours)]
    if hasattr(os, 'fork'):
        commands.append((f'socks.py -w {os.cpu_count()}', ours + ['-w', 'auto']))
    found = {name: path for name in ('microsocks', 'sockd', 'danted')
             for path in [shutil.which(name, path=os.environ['PATH'] + ':/usr/sbin')] if path}
    if 'microsocks' in found:
        commands.append(('microsocks', [found['microsocks'], '-i', '127.0.0.1', '-p', '{port}']))
    if {'sockd', 'danted'} & set(found):
        commands.append(('Dante', [found.get('sockd') or found['danted'], '-f', '{dante}',
                                   '-p', os.devnull]))
    commands += more
    return [Contender(name, command, seconds, loaders) for name, command in commands]


def named_command(text):
    """argparse type: (name, words) of NAME=COMMAND."""
    name, _, command = text.partition('=')
    if not name or '{port}' not in command:
        raise argparse.ArgumentTypeError(f'{text!r}: expected NAME=COMMAND with {{port}} in it')
    return name, shlex.split(command)


def positive(text):
    """argparse type: a number above 0."""
    if not (re.match(r'[0-9]+(\.[0-9]+)?$', text) and float(text)):
        raise argparse.ArgumentTypeError(f'{text!r}: expected a number above 0')
    return float(text)


def bench_table(figures):
    """A Markdown table of {name: {key: value}}; behind the values of ours, their ratio to the best
    of the others'."""
    names = list(figures)
    peers = [name for name in names if name != 'direct' and not name.startswith('socks.py')]
    rows = [['', *names], ['---'] * (len(names) + 1)]
    for key, title, form, more in FIGURES:
        values = [figures[name][key] for name in peers if key in figures[name]]
        best = (max if more else min)(values) if values else None
        cells = [title]
        for name in names:
            value = figures[name].get(key)
            cell = '-' if value is None else form.format(value)
            if best and value is not None and name.startswith('socks.py'):
                cell += f' ({value / best:.2f}x)'
            cells.append(cell)
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |'
                     for row in rows)


def bench(arguments):
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser(
        prog='python -m test_socks bench', description='Measure this server beside others.')
    parser.add_argument('more', nargs='*', metavar='NAME=COMMAND', type=named_command,
                        help='another SOCKS5 server, on 127.0.0.1 and {port}')
    parser.add_argument('--rounds', type=int, choices=range(1, 100), default=3, metavar='N',
                        help='(default: %(default)s)')
    parser.add_argument('--seconds', type=positive, default=0.7,
                        help='that each load runs (default: %(default)s)')
    parser.add_argument('--json', action='store_true', help='print all figures as JSON')
    args = parser.parse_args(arguments)
    socks.raise_descriptor_limit()
    runs = {}
    with loader_pool() as loaders:
        for number, contender in itertools.product(
                range(1, args.rounds + 1), contenders(args.more, args.seconds, loaders)):
            print(f'round {number} of {args.rounds}: {contender.name}', file=sys.stderr, flush=True)
            runs.setdefault(contender.name, []).append(contender.run())
    medians = {name: {key: statistics.median([run[key] for run in each if key in run])
                      for key, *_ in FIGURES if any(key in run for run in each)}
               for name, each in runs.items()}
    where = {'python': platform.python_version(), 'system': platform.platform(),
             'cores': os.cpu_count(), 'rounds': args.rounds, 'seconds': args.seconds}
    if args.json:
        print(json.dumps(dict(where, medians=medians, runs=runs), indent=1))
    else:
        print('Python {python}, {system}, {cores} cores; medians of {rounds} rounds of {seconds} '
              's; in brackets, ratios to the best of the others'.format(**where))
        print(bench_table(medians))


class BenchTest(unittest.TestCase):

    def test_all_figures_are_there(self):
        with unittest.mock.patch.dict(globals(), LOADERS=2), loader_pool() as loaders:
            direct, ours = contenders([], 0.05, loaders)[:2]
            ours.idle = 200
            figures = {'direct': direct.run(), 'socks.py': ours.run()}
        keys = {key for key, *_ in FIGURES}
        if os.path.exists('/proc/self/stat'):
            self.assertEqual(set(figures['socks.py']), keys)
        self.assertLessEqual({'gbit_1', 'gbit_8', 'p50_1', 'trips_64', 'conns_64', 'udp_16'},
                             set(figures['direct']))
        for each in figures.values():           # CPU and memory are too coarse for so little
            self.assertGreater(min(value for key, value in each.items()
                                   if not key.startswith(('cpu', 'idle'))), 0)

    def test_wrong_arguments(self):
        for argument, message in (('nothing', 'expected NAME=COMMAND'), ('a=b', 'with {port}'),
                                  ('--seconds=0', 'above 0'), ('--rounds=0', 'invalid choice')):
            with self.subTest(argument), contextlib.redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit):
                    bench([argument])
                self.assertIn(message, err.getvalue())

    def test_table(self):
        rows = bench_table({'direct': {'gbit_1': 40.0}, 'socks.py': {'gbit_1': 20.0, 'base': 24.0},
                            'a': {'gbit_1': 10.0, 'base': 6.0}, 'b': {'gbit_1': 5.0}}).split('\n')
        cells = [[cell.strip() for cell in row.split('|')] for row in rows]
        self.assertIn(['', 'one stream, Gbit/s', '40.0', '20.0 (2.00x)', '10.0', '5.0', ''], cells)
        self.assertIn(['', 'memory before the first, MiB', '-', '24.0 (4.00x)', '6.0', '-', ''],
                      cells)


if __name__ == '__main__':
    if sys.argv[1:2] == ['bench']:
        bench(sys.argv[2:])
    elif hasattr(os, 'fork') and (sys.argv[1:2] == ['-j'] or not sys.argv[1:]):
        number = int(sys.argv[2]) if sys.argv[2:] else min(8, 2 * socks.processors() + 1)
        sys.exit(not Runner().run(Shared(number)).wasSuccessful())
    else:
        unittest.main(testRunner=Runner)
