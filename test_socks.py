#!/usr/bin/env python3
"""Tests of socks.py, with real sockets on loopback.  Run them: python -m test_socks

Programs that some tests talk to (curl, ssh, nc, ncat, proxychains4, unshare) are used where they
are installed; elsewhere those tests are skipped and say so.
"""

import contextlib
import faulthandler
import hashlib
import http.server
import io
import logging
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import socks
from socks import (Address, Choice, Credentials, Datagram, Greeting, ProtocolError, Reply, Request,
                   Request4, Response, Response4, Settings, Verdict)

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 10                           # seconds until something that must happen counts as failed
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


def resolve(address):
    return socks.run(socks.resolve(address))


def dial(addresses, seconds, source=()):
    return socks.run(socks.dial(addresses, socks.after(seconds), source))


def descriptors():
    """The open descriptors of this process, as far as the system tells."""
    with contextlib.suppress(OSError):
        return len(os.listdir('/proc/self/fd'))
    return 0


def hexed(text, **ports):
    """The bytes of a vector: hex digits, `61*300` for 300 bytes, `{port}` for a port."""
    for name, number in ports.items():
        text = text.replace('{%s}' % name, '%04x' % number)
    text = re.sub(r'([0-9a-f]{2})\*(\d+)', lambda m: m.group(1) * int(m.group(2)), text)
    return bytes.fromhex(text)


def pattern(text, **ports):
    """The regular expression of a vector's answer: `..` is any byte, `!00` any but 00, a final `~`
    says that more may follow."""
    for name, number in ports.items():
        text = text.replace('{%s}' % name, '%04x' % number)
    items = re.findall(r'!00|\.\.|[0-9a-f]{2}', text.replace(' ', ''))
    byte = {'..': b'.', '!00': b'[^\0]'}
    return b''.join(byte.get(item) or re.escape(bytes.fromhex(item)) for item in items)


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

    def send(self, data):
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

    def connect(self, host, port):
        """The response to a SOCKS5 CONNECT."""
        self.ask(Greeting(b'\0'), Choice)
        return self.ask(Request(socks.Command.CONNECT, Address(host, port)), Response)


def echo(peer):
    """Send back what comes; HTTP gets a page."""
    for data in iter(lambda: peer.sock.recv(65536), b''):
        if data.startswith(b'G'):
            peer.read(len(HTTP) - len(data))
            return peer.send(b'HTTP/1.0 200 OK\r\n\r\nhello')
        peer.send(data)


class Origin(socketserver.ThreadingTCPServer):
    """A target: serves each connection by function(peer); without one, the test takes it from
    `peers` and speaks itself."""
    allow_reuse_address = True
    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, function=None, host='127.0.0.1', port=0):
        self.address_family = socket.AF_INET6 if ':' in host else socket.AF_INET
        self.function = function
        self.peers = []
        self.threads = []
        super().__init__((host, port), None)
        self.port = self.server_address[1]
        self.threads.append(threading.Thread(target=self.serve_forever, args=(0.01,)))
        self.threads[0].start()

    def process_request(self, request, client_address):
        self.peers.append(Peer(request))
        if self.function:
            super().process_request(request, client_address)

    def finish_request(self, request, client_address):
        self.threads.append(threading.current_thread())
        with contextlib.suppress(OSError, EOFError):
            self.function(next(peer for peer in self.peers if peer.sock is request))

    def __exit__(self, *exc_info):
        self.shutdown()
        self.server_close()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE)
        for peer in self.peers:
            peer.sock.close()


class Case(unittest.TestCase):
    """A test that leaves no thread and no descriptor behind."""

    def setUp(self):
        before = threading.active_count(), descriptors()
        self.addCleanup(self.check_leaks, before)

    def check_leaks(self, before):
        with self.subTest('leaks'):
            eventually(lambda: (threading.active_count(), descriptors()) <= before)

    def enter(self, manager):
        """`with manager` up to the end of the test."""
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value

    def serve(self, handler_class=socks.Handler, server_class=socks.Server, host='127.0.0.1',
              **settings):
        """A running server; its log lines come to self.lines."""
        self.lines = []
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())
        socks.log.addHandler(handler)
        self.addCleanup(socks.log.removeHandler, handler)
        return self.enter(server_class((host, 0), Settings(**settings), handler_class).start())

    def origin(self, *args, **kwargs):
        return self.enter(Origin(*args, **kwargs))

    def peer(self, *args):
        return self.enter(Peer(*args))

    def tunnel(self, server, origin):
        """Both ends of a connection through the server."""
        near = self.peer(server.server_address)
        self.assertEqual(near.connect('127.0.0.1', origin.port).reply, 0)
        return near, self.enter(eventually(lambda: origin.peers and origin.peers.pop(0)))

    def slow_names(self):
        """Have look-ups of names under .slow wait for the event that is returned, then fail."""
        event, look_up = threading.Event(), socket.getaddrinfo

        def getaddrinfo(host, *args, **options):
            if host[-5:] in ('.slow', b'.slow'):
                event.wait(PATIENCE)
                raise socket.gaierror(socket.EAI_AGAIN, 'slow')
            return look_up(host, *args, **options)

        self.addCleanup(setattr, socket, 'getaddrinfo', look_up)
        self.addCleanup(event.set)
        socket.getaddrinfo = getaddrinfo
        return event

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
    faulthandler.dump_traceback_later(300, exit=True)
    logging.raiseExceptions = True
    socks.log.setLevel(logging.INFO)


def tearDownModule():
    faulthandler.cancel_dump_traceback_later()


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
]

MALFORMED = [
    ('greeting of SOCKS4', Greeting, '0401', Reply.GENERAL_FAILURE),
    ('choice of SOCKS4', Choice, '005a', Reply.GENERAL_FAILURE),
    ('credentials, version 5', Credentials, '0503626f6206736563726574', Reply.GENERAL_FAILURE),
    ('verdict, version 5', Verdict, '0500', Reply.GENERAL_FAILURE),
    ('request, version 4', Request, '040100017f0000010050', Reply.GENERAL_FAILURE),
    ('request, address type 0', Request, '050100007f0000010050', Reply.ADDRESS_TYPE_NOT_SUPPORTED),
    ('request, address type 2', Request, '050100027f0000010050', Reply.ADDRESS_TYPE_NOT_SUPPORTED),
    ('response, address type 5', Response, '05000005', Reply.ADDRESS_TYPE_NOT_SUPPORTED),
    ('SOCKS4 request, version 5', Request4, '0501', Reply.GENERAL_FAILURE),
    ('SOCKS4 userid too long', Request4, '0401005001020304 61*513', Reply.GENERAL_FAILURE),
    ('SOCKS4a name too long', Request4, '040100500000000100 61*256', Reply.GENERAL_FAILURE),
    ('SOCKS4 reply of SOCKS5', Response4, '0500', Reply.GENERAL_FAILURE),
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

    def test_messages(self):
        for name, message, data in MESSAGES:
            data = hexed(data)
            with self.subTest(name):
                self.assertEqual(message.pack(), data)
                self.check_unpack(message, data)

    def test_lenient(self):
        for name, message, data in LENIENT:
            with self.subTest(name):
                self.check_unpack(message, hexed(data))

    def check_unpack(self, message, data):
        """Whole with something behind it, byte by byte, and cut off at every byte."""
        read, rest = socks.reader(data + b'behind')
        self.assertEqual(type(message).unpack(read), message)
        self.assertEqual(rest(), b'behind')
        self.assertEqual(type(message).unpack(trickle(data)), message)
        for length in range(len(data)):
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
                    with self.assertRaises(EOFError):
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
    ('0', '0'),
    ('a_b-c.d', 'a_b-c.d'),
]
NO_NAMES = ['', '.', 'a\0b', 'a b', 'a\nb', 'a\x7f', 'fe80::1%lo', 'a:b', '[a:b]', '\udcff',
            'ü' * 99]

LOCAL = ['127.0.0.1', '127.1.2.3', '0.0.0.0', '0.1.2.3', '169.254.169.254', '224.0.0.1',
         '255.255.255.255', '::', '::1', 'fe80::1', 'ff02::1', 'fd00:ec2::254', '::ffff:127.0.0.1',
         '::127.0.0.1', '64:ff9b::7f00:1', '2002:7f00:1::', '2002:a9fe:a9fe::1']
NOT_LOCAL = ['10.0.0.1', '192.168.1.1', '1.2.3.4', '128.0.0.1', '2001:db8::1', 'fd00::1',
             '64:ff9b::102:304', '2002:102:304::1', '::ffff:1.2.3.4']


class SocketsTest(Case):

    def test_canonical(self):
        for host, expected in CANONICAL:
            with self.subTest(host):
                self.assertEqual(socks.canonical(Address(host, 80)), Address(expected, 80))

    def test_what_no_name_has(self):
        for host in NO_NAMES:
            with self.subTest(host), self.assertRaises(ProtocolError) as caught:
                socks.canonical(Address(host, 80))
            self.assertTrue(str(caught.exception).isprintable(), host)

    def test_resolve(self):
        self.assertEqual(resolve(Address('1.2.3.4', 80)), [Address('1.2.3.4', 80)])
        self.assertIn(Address('127.0.0.1', 80), resolve(Address('localhost', 80)))
        self.assertEqual(resolve(Address('127.1', 80)), [Address('127.0.0.1', 80)])

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
        self.assertEqual(socks.run(socks.ready([one], (), socks.after(PATIENCE))), [one])
        with self.assertRaises(socket.timeout):
            socks.run(socks.ready([one], (), time.monotonic() - 1))

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

    def test_dial_source(self):
        origin = self.origin()
        target = [Address('127.0.0.1', origin.port)]
        with dial(target, PATIENCE, ('127.0.0.2',)) as sock:
            self.assertEqual(sock.getsockname()[0], '127.0.0.2')
        with self.assertRaisesRegex(OSError, 'family') as caught:
            dial(target, PATIENCE, ('::1',))
        self.assertEqual(socks.reply_for(caught.exception), Reply.NETWORK_UNREACHABLE)

    def test_is_local(self):
        self.assertEqual([host for host in LOCAL if not socks.is_local(host)], [])
        self.assertEqual([host for host in NOT_LOCAL if socks.is_local(host)], [])

    def test_shown(self):
        for text, expected in [('bob', 'bob'), ('用户', '用户'), ('a b', "'a b'"), ('', "''"),
                               ('a\nb', r"'a\nb'"), ('\x1b[2J', r"'\x1b[2J'"),
                               ('\udcff', r"'\udcff'")]:
            self.assertEqual(socks.shown(text), expected)

    def test_authenticated(self):
        users = {b'bob': b'secret', b'eve': b''}
        for name, password, expected in [
                (b'bob', b'secret', True), (b'bob', b'secre', False), (b'bob', b'', False),
                (b'', b'', False), (b'eve', b'', True), (b'carl', b'', False),
                (b'carl', b'secret', False)]:
            with self.subTest(name=name, password=password):
                self.assertEqual(socks.authenticated(users, Credentials(name, password)), expected)


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
     '485454502f312e3020353031~', True),
    ('N-20 TLS', '16030100a5', '', True),
    ('R-01', '050100 / 050100017f000001{port} / ' + GET,
     '0500 / 05000001............ / ' + PAGE, False),
    ('R-02 name', '050100 / 05010003096c6f63616c686f7374{port}',
     '0500 / 05000001............', False),
    ('R-03 IPv4 text', '050100 / 05010003093132372e302e302e31{port}',
     '0500 / 05000001............', False),
    ('R-04 IPv6 text', '050100 / 05010003033a3a31{port}', '0500 / 05000004~', False),
    ('R-05 in brackets', '050100 / 05010003055b3a3a315d{port}', '0500 / 05000004~', False),
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
USERS = {b'bob': b'secret', '用户'.encode(): '密码'.encode()}


class VectorCase(Case):
    """Every vector, in the parts it names and one byte at a time."""

    def setUp(self):
        super().setUp()
        origin = self.origin(echo)
        self.origin(echo, host='::1', port=origin.port)
        self.ports = {'port': origin.port, 'refused': self.refused_port(),
                      'silent': self.silent_port()}

    def check(self, vectors, server):
        for name, sends, answers, closes in vectors:
            sends = sends.replace('{port2}', '{port}')
            for step in (None, 1):
                with self.subTest(name, step=step), Peer(server.server_address) as peer:
                    self.converse(peer, sends.split('/'), answers.split('/'), step)
                    if closes:
                        lost = () if answers.strip() else (ConnectionResetError,)
                        with contextlib.suppress(*lost):
                            self.assertEqual(peer.rest(), b'')

    def converse(self, peer, sends, answers, step):
        self.assertEqual(len(sends), len(answers))
        for send, answer in zip(sends, answers):
            data = hexed(send, **self.ports)
            with contextlib.suppress(ConnectionError):  # an endless message is not read to its end
                for start in range(0, min(len(data), 1000), step or len(data)):
                    peer.send(data[start:start + (step or len(data))])
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

    def test_silence_ends_the_handshake(self):
        """N-16, N-21: one deadline for all of it, however slowly the client goes on."""
        server = self.serve(handshake_timeout=0.3)
        for start in ('', '0509 00', '050100', '050100050100'):
            with self.subTest(start), Peer(server.server_address) as peer:
                started = time.monotonic()
                peer.send(hexed(start))
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

            def authorize(self, client, target):
                super().authorize(client, target)
                if target.host == '3.3.3.3':
                    raise socks.Refused('not there')

        class Teapot(socks.Handler):
            def do_BIND(self, request):
                raise socks.Refused('a teapot', reply=Reply.TTL_EXPIRED)

        server = self.serve(Teapot, Strict)
        peer = self.peer(server.server_address)
        self.assertEqual(peer.connect('3.3.3.3', 80), Response(Reply.NOT_ALLOWED))
        peer = self.peer(server.server_address)
        peer.ask(Greeting(b'\0'), Choice)
        self.assertEqual(peer.ask(Request(2, Address('1.1.1.1', 1)), Response).reply,
                         Reply.TTL_EXPIRED)
        with self.assertRaises((OSError, EOFError)):
            self.peer(server.server_address, ('127.0.0.3', 0)).connect('127.0.0.1', 1)

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
        self.assertEqual(peer.connect('::1', origin.port), Response(Reply.NETWORK_UNREACHABLE))

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
        eventually(lambda: self.lines)
        self.assertRegex(self.lines[0], r'^127\.0\.0\.1:\d+ bob SOCKS5 CONNECT localhost:%d: done, '
                                        r'5 bytes up, 5 down, 0\.\d+ s$' % self.ports['port'])

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


# ------------------------------------------------------------------------------------------- relay

def pour(peer, size, seed):
    """Send `size` random bytes; returns their hash."""
    digest, source = hashlib.sha256(), random.Random(seed)
    block = bytes(source.getrandbits(8) for _ in range(1 << 16)) * 4
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
        self.start()

    def run(self):
        function, args = self.call
        self.value = function(*args)

    def result(self):
        self.join(60)
        return self.value


class RelayTest(Case):

    def setUp(self):
        super().setUp()
        self.held = self.origin()

    def test_both_ways_at_once(self):
        """64 MiB each way, every byte intact."""
        near, far = self.tunnel(self.serve(), self.held)
        size = 64 << 20
        jobs = [Background(*job) for job in ((pour, near, size, 1), (pour, far, size, 2),
                                             (drink, near), (drink, far))]
        sent_up, sent_down, came_down, came_up = [job.result() for job in jobs]
        self.assertEqual((sent_up, sent_down), (came_up, came_down))
        self.assertNotEqual(sent_up, sent_down)

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
        eventually(lambda: self.lines)
        self.assertIn('done, 10 bytes up, 18 down', self.lines[0])

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
        self.assertIn('Connection reset by peer', self.lines[0])

    def test_answer_of_a_target_that_resets(self):
        """A target that refuses an upload, says why and resets: the client still reads why."""
        near, far = self.tunnel(self.serve(), self.held)
        near.send(b'x' * 100000)
        far.read(1)
        far.send(b'413 too large')
        far.sock.close()                        # with unread input: RST
        self.assertEqual(near.read(13), b'413 too large')
        with self.assertRaises(ConnectionError):
            while True:
                near.send(b'x' * 10000)
                time.sleep(0.001)

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
        server = self.serve()
        pairs = [self.tunnel(server, self.held) for _ in range(120)]
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
        jobs = [Background(*job) for job in ((pour, near, 1 << 16, 1), (pour, far, 1 << 16, 2),
                                             (drink, near), (drink, far))]
        sent_up, sent_down, came_down, came_up = [job.result() for job in jobs]
        self.assertEqual((sent_up, sent_down), (came_up, came_down))

    def test_early_data(self):
        """What a client sends before the reply goes to the target first, once, in order."""
        early = bytes(range(256)) * 64
        peer = self.peer(self.serve().server_address)
        peer.send(hexed('050100 050100017f000001{port}', port=self.held.port) + early)
        far = self.enter(eventually(lambda: self.held.peers and self.held.peers.pop()))
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
        self.assertEqual(idle.rest(), b'')
        self.assertGreater(time.monotonic() - started, 0.3)
        eventually(lambda: self.lines)
        self.assertIn(': idle, ', self.lines[0])
        self.assertEqual(len(server.clients), 1)

    def test_close(self):
        """server_close() ends tunnels, conversations and connects within a second."""
        server = self.serve()
        near, far = self.tunnel(server, self.held)
        talking = self.peer(server.server_address)
        talking.ask(Greeting(b'\0'), Choice)
        dialling = self.peer(server.server_address)
        dialling.ask(Greeting(b'\0'), Choice)
        dialling.send(Request(1, Address('127.0.0.1', self.silent_port())).pack())
        eventually(lambda: len(server.clients) == 3)
        started = time.monotonic()
        server.server_close()
        self.assertLess(time.monotonic() - started, 1)
        for peer in (near, far, talking):
            self.assertEqual(peer.rest(), b'')
        self.assertEqual(dialling.read(2), b'\5\1')
        self.assertFalse(server.clients)

    def test_many(self):
        """500 tunnels in one loop, each with its own bytes."""
        server = self.serve(server_class=OneLoop)
        pairs = [self.tunnel(server, self.held) for _ in range(500)]
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

        task = socks.Task(socks.Client(server, Address('127.0.0.1', 1)), near, conversation())
        loop = socks.Loop()
        task.start(loop)
        task.ready(near, socks.READ)
        task.ready(near, socks.READ)
        thread = Background(loop.run)
        client.send(b'x')
        target.settimeout(PATIENCE)
        self.assertEqual(target.recv(1), b'x')
        loop.stop()
        thread.result()
        loop.close()


class TimersTest(unittest.TestCase):

    class Item:
        due = None

    def test_order_and_change(self):
        timers, (a, b, c) = socks.Timers(), (self.Item() for _ in range(3))
        self.assertIsNone(timers.pause(0))
        for item, when in ((a, 10.0), (b, 5.0), (c, 7.0), (a, 1.0), (c, None)):
            timers.set(item, when)
        self.assertAlmostEqual(timers.pause(0), 1.0, delta=0.1)
        self.assertEqual(timers.expired(0.9), [])
        self.assertEqual(timers.expired(6.0), [a, b])
        self.assertIsNone(timers.pause(6.0))
        self.assertEqual(timers.expired(100.0), [])


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
        six = self.serve(host='::1')
        for kind, host, answer_class, its in [
                (Request, '127.0.0.1', Response, server), (Request, '0.0.0.0', Response, server),
                (Request, 'localhost', Response, server), (Request, '::1', Response, six),
                (Request4, '127.0.0.1', Response4, server),
                (Request4, '0.0.0.0', Response4, server),
                (Request4, 'localhost', Response4, server), (Request, '::', Response, six)]:
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
        server = self.serve(bind_timeout=0.3)
        for kind, answer_class, refusal in [(Request, Response, Reply.NOT_ALLOWED),
                                            (Request4, Response4, 0x5b)]:
            client, address = self.bind(server, '127.0.0.1', kind)
            stranger = self.peer(address, ('127.0.0.2', 0))
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
        client, _ = self.bind(server)
        self.assertEqual(Response.unpack(client.read), Response(Reply.TTL_EXPIRED))
        client, _ = self.bind(server, kind=Request4)
        self.assertEqual(Response4.unpack(client.read), Response4(0x5b))

    def test_client_leaves(self):
        """Its port is free at once."""
        client, address = self.bind(self.serve())
        client.finish()
        self.assertEqual(client.rest(), b'')
        eventually(lambda: self.lines)
        self.assertIn('BIND 127.0.0.1:0: the client left', self.lines[0])
        with self.assertRaises(ConnectionRefusedError):
            self.peer(address)

    def test_early_data(self):
        """What the client sends before the peer comes is kept; a flood of it waits."""
        client, address = self.bind(self.serve())
        client.send(b'early')
        client.sock.settimeout(0.3)
        with self.assertRaises(socket.timeout):
            while True:
                client.send(bytes(1 << 20))
        client.sock.settimeout(PATIENCE)
        target = self.peer(address)
        self.assertEqual(target.read(5), b'early')
        self.assertEqual(target.read(1 << 16), bytes(1 << 16))
        self.assertEqual(Response.unpack(client.read).reply, 0)

    def test_advertise(self):
        """The address told; listened on if it is ours."""
        server = self.serve(host='127.0.0.1', advertise=('203.0.113.9',))
        self.assertEqual(self.bind(server)[1].host, '127.0.0.1')


# --------------------------------------------------------------------------------------------- UDP

class Echo:
    """A UDP target that answers each datagram with `prefix` before it."""

    def __init__(self, host='127.0.0.1', prefix=b'E:'):
        self.sock = socket.socket(socks.family_of(host), socket.SOCK_DGRAM)
        self.sock.bind((host, 0))
        self.address = Address(*self.sock.getsockname()[:2])
        self.prefix = prefix
        self.seen = []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        for data, source in iter(lambda: self.sock.recvfrom(65535), None):
            if data == b'stop':
                return
            self.seen.append(data)
            with contextlib.suppress(OSError):
                self.sock.sendto(self.prefix + data, source)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.sock.sendto(b'stop', self.address)
        self.thread.join()
        self.sock.close()


class Associate:
    """A client with a UDP association."""

    def __init__(self, server, hint=Address('0.0.0.0', 0)):
        self.control = Peer(server.server_address)
        self.control.ask(Greeting(b'\0'), Choice)
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


class UdpTest(Case):

    def associate(self, server, *args):
        return self.enter(Associate(server, *args))

    def echo(self, *args):
        return self.enter(Echo(*args))

    def test_vectors(self):
        """U-10 to U-23, also with the target known already, and the association intact."""
        echo = self.echo()
        client = self.associate(self.serve())
        for name, datagrams, answers in DATAGRAM_VECTORS * 2:
            for datagram, answer in zip(datagrams, answers):
                with self.subTest(name, datagram=datagram):
                    client.send(hexed(datagram, port=echo.address.port))
                    if answer:
                        self.assertEqual(client.receive(), hexed(answer, port=echo.address.port))
        self.assertTrue(client.nothing_comes())
        self.assertEqual(client.ask(Datagram(echo.address, b'!').pack())[-3:], b'E:!')

    def test_hints(self):
        """U-01 to U-06: any DST is fine, and the answer is of the control connection's family."""
        server, echo = self.serve(), self.echo()
        for hint in (Address('0.0.0.0', 0), 'own', Address('0', 50000), Address('::', 0),
                     Address('127.0.0.1', 0),
                     Address('8.8.8.8', 53), Address('nowhere.invalid', 9)):
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
        eventually(lambda: self.lines)
        self.assertIn('UDP_ASSOCIATE', self.lines[0])
        self.assertIn('done, 1 bytes up, 3 down', self.lines[0])

    def test_idle(self):
        client = self.associate(self.serve(udp_timeout=0.2))
        self.assertEqual(client.control.rest(), b'')
        eventually(lambda: self.lines)
        self.assertIn(': idle, ', self.lines[0])

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
            payload = bytes(random.Random(size).getrandbits(8) for _ in range(size))
            answer = Datagram.unpack(client.ask(Datagram(echo.address, payload).pack()))
            self.assertEqual(answer.payload, payload)
        echo.prefix = b'1'                      # too large for the header
        client.send(Datagram(echo.address, bytes(65497)).pack())
        self.assertTrue(client.nothing_comes())

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
        """Few at a time, so that one client cannot keep all threads; they may outlast it."""
        event = self.slow_names()
        server, echo = self.serve(), self.echo()
        client = self.associate(server)
        for number in range(200):
            client.send(Datagram(Address('%d.slow' % number, 9), b'').pack())
        self.assertEqual(client.ask(Datagram(echo.address, b'x').pack())[-3:], b'E:x')
        crew = [thread for thread in threading.enumerate() if thread.name == 'socks-crew']
        self.assertLessEqual(len(crew), socks.Routes.LOOKUPS)
        client.control.finish()
        eventually(lambda: self.lines)
        event.set()
        with Peer(server.server_address) as peer:
            peer.connect('localhost', 1)
        self.assertEqual([line for line in self.lines if 'bug' in line], [])

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
        eventually(lambda: self.lines)
        self.assertIn(f'no UDP port is free of {port} to {port}', self.lines[0])

    def test_not_in_socks4(self):
        peer = self.peer(self.serve().server_address)
        self.assertEqual(peer.ask(Request4(3, Address('127.0.0.1', 1)), Response4), Response4(0x5b))

    def test_look_ups_keep_order(self):
        """Datagrams to a name wait for its look-up in order; others pass them by."""
        echo = self.echo('127.0.0.1', b'')
        client = self.associate(self.serve())
        for number in range(20):
            client.send(Datagram(Address('localhost', echo.address.port), b'%d' % number).pack())
        numbers = [int(Datagram.unpack(client.receive()).payload) for _ in range(20)]
        self.assertEqual(numbers, sorted(numbers))

    def test_many(self):
        """500 associations at once, each with its own answers."""
        server, echo = self.serve(udp_strict=True), self.echo()
        clients = [self.associate(server) for _ in range(500)]
        for start in range(0, 500, 50):         # as many as the target's buffer is sure to hold
            for number, client in enumerate(clients[start:start + 50]):
                client.send(Datagram(echo.address, b'%d' % number).pack())
            for number, client in enumerate(clients[start:start + 50]):
                self.assertEqual(Datagram.unpack(client.receive()).payload, b'E:%d' % number)
        self.assertTrue(all(client.nothing_comes(0) for client in clients))

    def test_garbage(self):
        """10,000 malformed datagrams from owner and strangers; it serves on, with no descriptor
        more."""
        class Only(socks.Server):
            def authorize(self, client, target):
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
                data = bytearray(source.getrandbits(8) for _ in range(source.randrange(40)))
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
        self.assertRegex(self.lines[-1], r'done, \d+ datagrams dropped')


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


# --------------------------------------------------------------------------------------- lifecycle

class LifecycleTest(Case):

    def test_addresses(self):
        """Several listeners; a port 0 is the same port on all of them."""
        with socks.Server([('127.0.0.1', 0), ('localhost', 0), ('::1', 0)][::2]).start() as server:
            self.assertEqual([a.host for a in server.addresses], ['127.0.0.1', '::1'])
            self.assertEqual(len({a.port for a in server.addresses}), 1)
            for address in server.addresses:
                with Peer(address) as peer:
                    self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))

    def test_name(self):
        with socks.Server(('localhost', 0)) as server:
            self.assertIn(server.server_address.host, ('127.0.0.1', '::1'))

    def test_port_in_use(self):
        with socks.Server(('127.0.0.1', 0)) as server:
            with self.assertRaisesRegex(OSError, 'cannot listen on 127.0.0.1:') as caught:
                socks.Server(server.server_address)
            self.assertTrue(caught.exception.errno)

    def test_no_open_proxy(self):
        for host in ('0.0.0.0', '::'):
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
        with self.assertRaisesRegex(OSError, 'not ours'):
            socks.Server(('127.0.0.1', 0), Settings(source=('203.0.113.1',)))

    def test_max_clients(self):
        """One more client than allowed waits until another one leaves."""
        server = self.serve(max_clients=2)
        first, second = [self.peer(server.server_address) for _ in range(2)]
        for peer in (first, second):
            peer.ask(Greeting(b'\0'), Choice)
        third = self.peer(server.server_address)
        third.send(Greeting(b'\0').pack())
        self.assertFalse(ready([third.sock], [], 0.3))
        first.sock.close()
        self.assertEqual(third.read(2), b'\5\0')

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
        """2,000 aborted handshakes and 2,000 aborted tunnels leave nothing behind."""
        server, origin = self.serve(), self.origin()
        threads, files = threading.active_count(), descriptors()
        source = random.Random(1)
        handshake = hexed('050100 050100017f000001{port}', port=origin.port)
        for length in [source.randrange(len(handshake)) for _ in range(2000)] + [13] * 2000:
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
        """5,000 random handshakes and 5,000 damaged ones; then a normal client is served."""
        class Only(socks.Handler):
            def destinations(self, address, until):
                """Whatever the bytes say, nobody else is bothered."""
                if socks.canonical(address) != Address('127.0.0.1', origin.port):
                    raise socks.Refused('somebody else')
                return super().destinations(address, until)

        server, origin = self.serve(Only), self.origin(echo)
        source = random.Random(2)
        valid = [hexed(sends.replace('/', ''), port=origin.port, refused=1, silent=1, port2=1)
                 for _, sends, _, _ in NO_AUTHENTICATION if 'silent' not in sends]
        for number in range(10000):
            if number % 2:
                data = bytes(source.getrandbits(8) for _ in range(source.randrange(40)))
                data = source.choice((b'', b'\4', b'\5', b'\5\1\0\5')) + data
            else:
                data = bytearray(source.choice(valid)[:300])
                for _ in range(source.randrange(1, 4)):
                    data[source.randrange(len(data))] = source.getrandbits(8)
            with Peer(server.server_address) as peer, contextlib.suppress(OSError):
                peer.send(data)
                peer.finish()
        eventually(lambda: not server.clients)
        self.assertEqual([line for line in self.lines if 'bug' in line], [])
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
        server, origin = self.serve(connect_timeout=0.3), self.origin(echo)
        slow = [self.peer(server.server_address) for _ in range(40)]
        for peer in slow:
            peer.ask(Greeting(b'\0'), Choice)
            peer.send(Request(1, Address('name.slow', origin.port)).pack())
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
        crew = [thread for thread in threading.enumerate() if thread.name == 'socks-crew']
        self.assertGreater(len(crew), 40)
        self.assertEqual([line for line in self.lines if 'bug' in line], [])

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
        self.assertRegex(self.lines[0], r'^127.0.0.1:\d+: this is a bug$')
        eventually(lambda: not server.clients)


class Inside(Case):
    """In a network namespace of our own: 198.51.100.1 is ours, and some routes fail."""

    def test_unreachable(self):
        """R-10, R-11, R-13: the errors of routes."""
        server = self.serve()
        for host, reply in (('203.0.113.5', Reply.HOST_UNREACHABLE),
                            ('1.2.3.4', Reply.NETWORK_UNREACHABLE),
                            ('2001:db8::1', Reply.NETWORK_UNREACHABLE),
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
                peer.ask(Greeting(b'\0'), Choice)
                self.assertEqual(peer.ask(Request(2, Address(host, 0)), Response).reply, reply)
        with Associate(server) as client, Echo('198.51.100.1') as ours:
            client.send(Datagram(echo.address, b'no').pack())
            self.assertEqual(client.ask(Datagram(ours.address, b'yes').pack())[-5:], b'E:yes')
            self.assertEqual(echo.seen, [])

    def test_advertise(self):
        """The address that is told; and listened on, if it is ours."""
        for told in ('203.0.113.9', '198.51.100.2'):
            server = self.serve(host='198.51.100.1', open=True, advertise=('2001:db8::1', told))
            for command in (2, 3):
                peer = self.peer(server.server_address)
                peer.ask(Greeting(b'\0'), Choice)
                address = peer.ask(Request(command, Address('198.51.100.1', 0)), Response).address
                self.assertEqual(address.host, told)
                if (told, command) == ('198.51.100.2', 2):
                    with Peer(address, ('198.51.100.1', 0)):
                        self.assertEqual(Response.unpack(peer.read).reply, 0)


def needs(*programs):
    """Skip a test where one of the programs is missing."""
    missing = [program for program in programs if not shutil.which(program)]
    return unittest.skipIf(missing, f'not installed: {", ".join(missing)}')


def run(*command, **options):
    """The finished process, its output as text."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60, universal_newlines=True, **options)


class NamespaceTest(unittest.TestCase):

    @needs('unshare', 'ip')
    def test_inside(self):
        """The tests of Inside, in a namespace where they can set routes."""
        script = ('ip link set lo up; ip address add 198.51.100.1/32 dev lo;'
                  'ip address add 198.51.100.2/32 dev lo; ip route add unreachable 203.0.113.0/24;'
                  'ip route add prohibit 192.0.2.0/24;'
                  'exec "$0" -m test_socks Inside')
        if run('unshare', '-rn', 'true').returncode:
            self.skipTest('this user cannot make namespaces')
        done = run('unshare', '-rn', 'sh', '-ec', script, sys.executable, cwd=HERE)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r'Ran [1-9]')


# ------------------------------------------------------------------------- command line and README

class Program:
    """`python socks.py` as a process on a free port; its log is in `log` afterwards."""

    def __init__(self, *arguments, prefix=(), **environment):
        self.errors = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(
            [*prefix, sys.executable, os.path.join(HERE, 'socks.py'), '-p', '0', *arguments],
            stdout=subprocess.PIPE, stderr=self.errors, universal_newlines=True,
            env=dict(os.environ, **environment))
        self.address = ('127.0.0.1', int(self.process.stdout.readline().rpartition(':')[2]))
        self.port = self.address[1]

    def __enter__(self):
        return self

    def stop(self, number=signal.SIGTERM):
        """The exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.stop()
        self.process.stdout.close()
        self.errors.seek(0)
        self.log = self.errors.read()
        self.errors.close()


# Arguments, and what the one line of the error must say.
WRONG_USAGE = [
    (['-p', '65536'], r"-p/--port: '65536': expected a port, 0 to 65535"),
    (['-p', 'x'], r"-p/--port: 'x': expected a port"),
    (['-b', '1.2.3.4:x'], r"-b/--bind: 'x': expected a port"),
    (['-b', ''], r"-b/--bind: '': expected ADDRESS"),
    (['-b', 'a:b:c'], r"-b/--bind: 'a:b:c': expected ADDRESS"),
    (['-b', '[1.2.3.4]'], r"-b/--bind: '\[1.2.3.4\]': expected ADDRESS"),
    (['-u', 'bob'], r'-u/--user: expected NAME:PASSWORD'),
    (['-u', ':secret'], r'-u/--user: expected NAME:PASSWORD'),
    (['-u', 'b' * 256 + ':x'], r'-u/--user: expected NAME:PASSWORD'),
    (['-u', 'bob:a', '-u', 'bob:b'], r'a user is given twice'),
    (['--source', 'localhost'], r"--source: 'localhost': expected an IP address"),
    (['--source', '127.0.0.1', '--source', '127.0.0.2'], r'--source: expected one address of'),
    (['--advertise', '::1', '--advertise', '::2'], r'--advertise: expected one address of'),
    (['--udp-ports', '5-4'], r"--udp-ports: '5-4': expected LOW-HIGH, from 1 to 65535"),
    (['--udp-ports', '0'], r"--udp-ports: '0': expected LOW-HIGH"),
    (['--udp-ports', '1-x'], r"--udp-ports: 'x': expected a port"),
    (['--idle-timeout', '-1'], r"--idle-timeout: '-1': expected seconds, 0 or more"),
    (['--connect-timeout', 'nan'], r"--connect-timeout: 'nan': expected seconds"),
    (['--max-clients', '1.5'], r"--max-clients: '1.5': expected a whole number"),
    (['-b', '0.0.0.0'], r'would serve everybody.*SOCKS_USERS.*--open'),
    (['-p', '²'], r"-p/--port: '²': expected a port"),
    (['--frobnicate'], r'unrecognized arguments: --frobnicate'),
]


def in_process(*arguments, **environment):
    """Exit status, stdout and stderr of main() in this process; for what ends without serving."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = socks.main(list(arguments))
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


class CommandLineTest(Case):

    def test_serves_and_stops(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with Program() as program, Peer(program.address) as peer:
                self.assertEqual(peer.ask(Greeting(b'\0'), Choice), Choice(0))
                self.assertEqual(program.stop(number), 0)
            self.assertIn(f'INFO listening on 127.0.0.1:{program.port}', program.log)
            self.assertNotIn('Traceback', program.log)

    def test_wrong_usage(self):
        for arguments, message in WRONG_USAGE:
            with self.subTest(arguments):
                status, out, err = in_process(*arguments)
                self.assertEqual((status, out), (2, ''))
                self.assertRegex(err.splitlines()[-1], message)

    def test_cannot_start(self):
        with socks.Server(('127.0.0.1', 0)) as server:
            for arguments, message in [
                    (['-p', str(server.server_address.port)], 'Address already in use'),
                    (['-b', '203.0.113.1', '--open'], 'Cannot assign requested address'),
                    (['-b', '127.0.0.1:0', '-b', '203.0.113.1', '--open'], '203.0.113.1:1080: '),
                    (['-b', '127.0.0.1:0', '-b', 'localhost:0', '-p', '0'], 'already in use'),
                    (['--source', '203.0.113.1'], 'connect from 203.0.113.1: it is not'),
                    (['-b', 'nowhere.invalid'], 'nowhere.invalid is never resolved')]:
                with self.subTest(arguments):
                    done = run(sys.executable, 'socks.py', *arguments, cwd=HERE)
                    self.assertEqual((done.returncode, done.stdout), (1, ''))
                    self.assertRegex(done.stderr, f'^socks.py: cannot .*{message}.*\n$')

    def test_users(self):
        with Program('-u', 'eve:a:b', SOCKS_USERS='bob:secret  carl:') as program:
            for name, password, status in [(b'bob', b'secret', 0), (b'eve', b'a:b', 0),
                                           (b'carl', b'', 0), (b'bob', b'', 1)]:
                with self.subTest(name), Peer(program.address) as peer:
                    self.assertEqual(peer.ask(Greeting(b'\2'), Choice), Choice(2))
                    self.assertEqual(peer.ask(Credentials(name, password), Verdict).status, status)
        self.assertIn('WARNING -u shows passwords', program.log)
        self.assertNotIn('secret', program.log)

    def test_wrong_users_in_the_environment(self):
        done = run(sys.executable, 'socks.py', cwd=HERE,
                   env=dict(os.environ, SOCKS_USERS='hunter2'))
        self.assertEqual(done.returncode, 2)
        self.assertIn('expected NAME:PASSWORD', done.stderr)
        self.assertNotIn('hunter2', done.stderr)

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
                ('--advertise 192.0.2.1', {'advertise': ('192.0.2.1',)}),
                ('--udp-ports 5-9', {'udp_ports': (5, 9)}),
                ('--udp-ports 5', {'udp_ports': (5, 5)}),
                ('--handshake-timeout 1', {'handshake_timeout': 1}),
                ('--connect-timeout 2.5', {'connect_timeout': 2.5}),
                ('--bind-timeout 3', {'bind_timeout': 3}),
                ('--idle-timeout 4', {'idle_timeout': 4}),
                ('--udp-timeout 0', {'udp_timeout': 0}),
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
        for arguments in ([], ['--max-clients', '1000']):
            with self.subTest(arguments), self.origin(echo) as origin, Program(
                    *arguments, prefix=('sh', '-c', 'ulimit -n 64; exec "$0" "$@"')) as program:
                with Peer(program.address) as tunnel, contextlib.ExitStack() as stack:
                    self.assertEqual(tunnel.connect('127.0.0.1', origin.port).reply, 0)
                    for _ in range(200):
                        stack.enter_context(Peer(program.address)).send(b'\5')
                    time.sleep(0.2)
                    before = cpu_seconds(program.process.pid)
                    time.sleep(1)
                    self.assertLess(cpu_seconds(program.process.pid) - before, 0.1)
                    tunnel.send(b'alive')
                    self.assertEqual(tunnel.read(5), b'alive')
                eventually(lambda: self.serves(program, origin))
            self.assertLess(program.log.count('cannot accept clients'), 20)

    def serves(self, program, origin):
        with Peer(program.address) as peer:
            return peer.connect('127.0.0.1', origin.port).reply == 0


def cpu_seconds(pid):
    """User and system time that a process has used."""
    with open(f'/proc/{pid}/stat') as file:
        fields = file.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


class ReadmeTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as file:
            cls.text = file.read()

    def test_options(self):
        """The README names the options that there are, and no others."""
        _, out, _ = in_process('--help')
        expected = set(re.findall(r'(?<![\w-])--?[a-zA-Z][a-z-]*', out.partition('examples:')[0]))
        section = self.text.partition('## Options')[2].partition('\n## ')[0]
        named = set(re.findall(r'`(--?[a-zA-Z][a-z-]*)', section))
        self.assertEqual(named | {'-h', '--help'}, expected)

    def test_python_examples(self):
        """They run, and print what they say."""
        examples = re.findall(r'```python\n(.*?)```', self.text, re.DOTALL)
        self.assertTrue(examples)
        for example in examples:
            with self.subTest(example):
                done = run(sys.executable, '-W', 'error', '-c', example, cwd=HERE)
                self.assertEqual((done.returncode, done.stderr), (0, ''))


# --------------------------------------------------------------------------------- foreign programs

class Page(http.server.BaseHTTPRequestHandler):
    """GET gives what stands in `pages`, by path."""
    pages = {'/': b'hello\n',
             '/large': random.Random(3).getrandbits(8 << 20).to_bytes(1 << 20, 'big')}

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
        with tempfile.TemporaryDirectory() as folder:
            names = [os.path.join(folder, str(number)) for number in range(50)]
            outputs = [word for name in names for word in ('-o', name, self.url + 'large')]
            self.assertEqual(self.curl(server, '-Z', '--parallel-immediate', '--parallel-max', '50',
                                       '--socks5', 'PROXY', *outputs), (0, ''))
            for name in names:
                with open(name, 'rb') as file:
                    self.assertEqual(file.read(), Page.pages['/large'])

    @needs('curl')
    def test_curl_as_http_proxy(self):
        """It gets a page that says what is wrong."""
        status, output = self.curl(self.serve(), '-x', 'http://PROXY', self.url)
        self.assertEqual(status, 0)
        self.assertIn('SOCKS', output)

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

    @needs('ssh', 'sshd', 'ssh-keygen', 'nc')
    def test_ssh(self):
        """ssh through OpenBSD's nc, as people write it in ~/.ssh/config."""
        server = self.serve()
        with tempfile.TemporaryDirectory() as folder, socket.socket() as reserved:
            reserved.bind(('127.0.0.1', 0))
            port = reserved.getsockname()[1]
            reserved.close()
            key = os.path.join(folder, 'key')
            run('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key, check=True)
            daemon = subprocess.Popen(
                [shutil.which('sshd'), '-D', '-e', '-f', '/dev/null', '-h', key, '-p', str(port),
                 '-o', 'ListenAddress=127.0.0.1', '-o', f'AuthorizedKeysFile={key}.pub',
                 '-o', 'StrictModes=no', '-o', 'PidFile=none'], stderr=subprocess.PIPE)
            try:
                self.assertIn(b'listening', daemon.stderr.readline())
                for version in '54':
                    done = run('ssh', '-F', '/dev/null', '-i', key, '-p', str(port), '-o',
                               f'ProxyCommand=nc -X {version} -x {server.server_address} %h %p',
                               '-o', 'StrictHostKeyChecking=no', '-o', 'BatchMode=yes',
                               '-o', 'UserKnownHostsFile=/dev/null', '127.0.0.1',
                               'head -c 3000000 /dev/zero | wc -c')
                    self.assertEqual(done.stdout.strip(), '3000000', done.stderr)
            finally:
                daemon.terminate()
                daemon.communicate()

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
        eventually(lambda: len(self.lines) % 2 == 0)
        self.assertTrue(any('BIND' in line and '300000 down' in line for line in self.lines))

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
        eventually(lambda: self.lines)
        self.assertIn('UDP_ASSOCIATE', self.lines[0])

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


def serve_ftp(peer):
    """An FTP server for one file, in active mode."""
    answers = {b'USER': b'331 password', b'PASS': b'230 in', b'PWD': b'257 "/"', b'TYPE': b'200 ok',
               b'SIZE': b'213 300000', b'QUIT': b'221 bye'}
    peer.send(b'220 ready\r\n')
    for line in peer.sock.makefile('rb'):
        command, _, argument = line.strip().partition(b' ')
        if command == b'EPRT':
            _, _, host, port, _ = argument.decode().split('|')
            answer = b'200 ok'
        elif command == b'RETR':
            peer.send(b'150 here it comes\r\n')
            with Peer((host, int(port))) as data:
                data.send(b'by FTP' * 50000)
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


def load_tests(loader, tests, pattern):
    """All but what other tests run in a namespace that they make, by its name."""
    return unittest.TestSuite(
        loader.loadTestsFromTestCase(case) for name, case in sorted(globals().items())
        if isinstance(case, type) and issubclass(case, unittest.TestCase)
        and not name.startswith('Inside'))


if __name__ == '__main__':
    unittest.main()
