#!/usr/bin/env python3
"""socks.py: a SOCKS4, SOCKS4a and SOCKS5 proxy in one file, on the standard library alone.

Run one::

    python socks.py -p 1080

Embed one, for example in a test suite (port 0 takes a free port)::

    with socks.Server(('127.0.0.1', 0)).start() as server:
        print(f'socks5h://{server.server_address}')

Speak the protocol; every message is a class with ``pack()`` and ``unpack()``::

    socks.Request(socks.Command.CONNECT, socks.Address('example.org', 80)).pack()

All that takes time is written as a conversation, a generator in straight lines that yields what it
waits for.  One `Loop`, a thread with a selector, goes on with whichever can go on: it accepts,
negotiates, dials and answers, and then moves the bytes of the `Tunnel`.  Other threads do only what
is better done elsewhere: name look-ups, which block, and tunnels that turn out to carry much.

Specifications: SOCKS4 and SOCKS4a (Ying-Da Lee), RFC 1928 (SOCKS5), RFC 1929 (user name and
password), RFC 8305 (connecting to a name with several addresses).

Sections, each of which uses only those before it: words, errors, wire format, sockets, access,
loops, relays, server, command line.
"""

import argparse
import contextlib
import enum
import errno
import functools
import ipaddress
import itertools
import logging
import os
import re
import select
import selectors
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import deque
from queue import Empty, Queue
from types import MappingProxyType
from typing import Callable, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

try:
    from queue import SimpleQueue
except ImportError:                     # Python 3.6
    SimpleQueue = Queue
try:
    import resource
except ImportError:                     # Windows
    resource = None

__version__ = '2.0.0'

log = logging.getLogger('socks')


# ------------------------------------------------------------------------------------------ words

class Method(enum.IntEnum):
    """Authentication methods (RFC 1928 section 3)."""
    NO_AUTHENTICATION = 0x00
    GSSAPI = 0x01
    USERNAME_PASSWORD = 0x02
    NO_ACCEPTABLE = 0xFF


class Command(enum.IntEnum):
    """What a request asks for (RFC 1928 section 4)."""
    CONNECT = 0x01
    BIND = 0x02
    UDP_ASSOCIATE = 0x03
    RESOLVE = 0xF0                      # these two are Tor's, see its socks-extensions.txt
    RESOLVE_PTR = 0xF1


class AddressType(enum.IntEnum):
    """How an address is written (RFC 1928 section 5)."""
    IPV4 = 0x01
    DOMAINNAME = 0x03
    IPV6 = 0x04


class Outcome(enum.IntEnum):
    """A code with its text."""

    def __new__(cls, code, text):
        member = int.__new__(cls, code)
        member._value_ = code
        member.text = text
        return member


class Reply(Outcome):
    """What became of a request (RFC 1928 section 6)."""
    SUCCEEDED = 0x00, 'Succeeded'
    GENERAL_FAILURE = 0x01, 'General SOCKS server failure'
    NOT_ALLOWED = 0x02, 'Connection not allowed by ruleset'
    NETWORK_UNREACHABLE = 0x03, 'Network unreachable'
    HOST_UNREACHABLE = 0x04, 'Host unreachable'
    CONNECTION_REFUSED = 0x05, 'Connection refused'
    TTL_EXPIRED = 0x06, 'TTL expired'
    COMMAND_NOT_SUPPORTED = 0x07, 'Command not supported, or protocol error'
    ADDRESS_TYPE_NOT_SUPPORTED = 0x08, 'Address type not supported'


class Reply4(Outcome):
    """What became of a SOCKS4 request (CD in its reply)."""
    GRANTED = 0x5A, 'Request granted'
    REJECTED = 0x5B, 'Request rejected or failed'
    NO_IDENTD = 0x5C, 'Request rejected because SOCKS server cannot connect to identd on the client'
    IDENT_MISMATCH = 0x5D, ('Request rejected because the client program and identd report '
                            'different user-ids')


# ----------------------------------------------------------------------------------------- errors

class ProxyError(OSError):
    """Base of everything that goes wrong in SOCKS; `reply` is the code that tells a client so.

    `socket_err` is the error that caused this one, if any; it shows in the text.
    """
    reply = Reply.GENERAL_FAILURE

    def __init__(self, msg, socket_err=None, reply=None):
        super().__init__(msg)
        self.msg = msg
        self.socket_err = socket_err
        if reply is not None:
            self.reply = reply

    def __str__(self):
        return f'{self.msg}: {self.socket_err}' if self.socket_err else self.msg


class ProxyConnectionError(ProxyError):
    """The proxy itself cannot be reached."""


class GeneralProxyError(ProxyError):
    """Anything that goes wrong while talking to a proxy."""


class SOCKS5AuthError(GeneralProxyError):
    """The SOCKS5 proxy accepts none of the methods offered, or not these credentials."""


class SOCKS5Error(GeneralProxyError):
    """The SOCKS5 proxy refused the request."""


class SOCKS4Error(GeneralProxyError):
    """The SOCKS4 proxy refused the request."""


class HTTPError(GeneralProxyError):
    """The HTTP proxy refused the request."""


class ProtocolError(GeneralProxyError):
    """Bytes that are not SOCKS, or name something that cannot be."""


class Refused(ProxyError):
    """Our own policy says no; `address` is whom it concerns, where a reply should tell."""
    reply = Reply.NOT_ALLOWED

    def __init__(self, msg, socket_err=None, reply=None, address=None):
        super().__init__(msg, socket_err, reply)
        self.address = address


ERRNO_REPLIES = {
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Reply.NETWORK_UNREACHABLE,
    errno.EADDRNOTAVAIL: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    getattr(errno, 'EHOSTDOWN', errno.EHOSTUNREACH): Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ECONNRESET: Reply.CONNECTION_REFUSED,
    errno.ETIMEDOUT: Reply.TTL_EXPIRED,
    errno.EAFNOSUPPORT: Reply.ADDRESS_TYPE_NOT_SUPPORTED,
}

# "There is no such name", as opposed to "the name server did not say".
NO_SUCH_NAME = {getattr(socket, name) for name in ('EAI_NONAME', 'EAI_NODATA', 'EAI_ADDRFAMILY')
                if hasattr(socket, name)}


def reply_for(error):
    """The `Reply` that tells a client of `error`, an OSError met on the way to its target."""
    if isinstance(error, ProxyError):
        return error.reply
    if isinstance(error, socket.timeout):
        return Reply.TTL_EXPIRED
    if isinstance(error, socket.gaierror):          # its errno is of another kind
        return Reply.HOST_UNREACHABLE if error.errno in NO_SUCH_NAME else Reply.GENERAL_FAILURE
    return ERRNO_REPLIES.get(error.errno, Reply.GENERAL_FAILURE)


def reason(error):
    """What `error` says, without its number."""
    return getattr(error, 'strerror', None) or str(error)


# ------------------------------------------------------------------------------------ wire format
#
# Each message is a tuple with pack() -> bytes and unpack(read).  read(n) gives exactly n bytes or
# raises EOFError, so the same code reads a socket, a datagram and a test's bytes, however they
# are split.  unpack raises ProtocolError, whose `reply` is what a server answers.

MAX_USERID = 512                        # bytes; SOCKS4 gives no length, so we bound both strings
MAX_NAME = 255


def reader(data):
    """A `read` function for unpack over the bytes of `data`, and one for all that is left."""
    left = memoryview(data)

    def read(n):
        nonlocal left
        if len(left) < n:
            raise EOFError(f'{n} bytes expected, {len(left)} left')
        taken, left = left[:n], left[n:]
        return bytes(taken)
    return read, lambda: read(len(left))


def expect_version(name, got, wanted):
    """Raise ProtocolError unless the version byte is the one `wanted`."""
    if got != wanted:
        raise ProtocolError(f'{name} version {got:#04x}, expected {wanted:#04x}')


def family_of(host):
    """The address family of an IP address given as text."""
    return socket.AF_INET6 if ':' in host else socket.AF_INET


def ip_bytes(host):
    """The 4 or 16 bytes of an IP address given as text; None for any other text."""
    try:
        return socket.inet_pton(family_of(host), host)
    except (OSError, ValueError):       # ValueError: NUL or characters outside ASCII
        return None


def ip_text(packed):
    """The text of an IP address given as 4 or 16 bytes."""
    return socket.inet_ntop(socket.AF_INET6 if len(packed) == 16 else socket.AF_INET, packed)


def name_bytes(name):
    """A host name as it is sent and resolved; ValueError if it cannot be (RFC 3490)."""
    try:
        return name.encode('ascii')
    except UnicodeEncodeError:
        return name.encode('idna')


def name_text(data):
    """The text of a host name as it came; bytes that are not UTF-8 become surrogates."""
    return data.decode('utf-8', 'surrogateescape')


class Address(NamedTuple):
    """A host, as an IP address or a name, and a port (RFC 1928 section 5)."""
    host: str
    port: int

    @classmethod
    def of(cls, sockaddr):
        """That of a socket's address, without flow and scope."""
        return cls(sockaddr[0].partition('%')[0], sockaddr[1])

    def __str__(self):
        return f'[{self.host}]:{self.port}' if ':' in self.host else f'{self.host}:{self.port}'

    def pack(self):
        """ATYP, ADDR, PORT.  The text of an IP address is always sent as that address."""
        packed = ip_bytes(self.host)
        if packed is None:
            name = name_bytes(self.host)
            if not 0 < len(name) <= MAX_NAME:
                raise ValueError(f'host name of {len(name)} bytes, expected 1 to {MAX_NAME}')
            packed = bytes((AddressType.DOMAINNAME, len(name))) + name
        else:
            packed = bytes((AddressType.IPV6 if len(packed) == 16 else AddressType.IPV4,)) + packed
        return packed + self.port.to_bytes(2, 'big')

    @classmethod
    def unpack(cls, read):
        kind = read(1)[0]
        if kind == AddressType.IPV4:
            host = ip_text(read(4))
        elif kind == AddressType.IPV6:
            host = ip_text(read(16))
        elif kind == AddressType.DOMAINNAME:
            host = name_text(read(read(1)[0]))
        else:                           # of unknown length, so nothing behind it can be read
            raise ProtocolError(f'address type {kind:#04x}, expected 0x01, 0x03 or 0x04',
                                reply=Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        return cls(host, int.from_bytes(read(2), 'big'))


UNSPECIFIED = Address('0.0.0.0', 0)


class Greeting(NamedTuple):
    """The client's first message: the methods it offers (RFC 1928 section 3)."""
    methods: bytes

    def pack(self):
        return bytes((5, len(self.methods))) + bytes(self.methods)

    @classmethod
    def unpack(cls, read):
        version, count = read(2)
        expect_version('SOCKS', version, 5)
        return cls(read(count))


class Choice(NamedTuple):
    """The method that the server takes (RFC 1928 section 3)."""
    method: int

    def pack(self):
        return bytes((5, self.method))

    @classmethod
    def unpack(cls, read):
        version, method = read(2)
        expect_version('SOCKS', version, 5)
        return cls(method)


class Credentials(NamedTuple):
    """User name and password, both bytes (RFC 1929 section 2); empty ones do occur."""
    username: bytes
    password: bytes

    def pack(self):
        for name, value in zip(self._fields, self):
            if len(value) > 255:
                raise ValueError(f'{name} of {len(value)} bytes, expected at most 255')
        return b''.join((bytes((1, len(self.username))), self.username,
                         bytes((len(self.password),)), self.password))

    @classmethod
    def unpack(cls, read):
        version, length = read(2)
        expect_version('user name/password', version, 1)
        username = read(length)
        return cls(username, read(read(1)[0]))


class Verdict(NamedTuple):
    """The server's answer to Credentials: 0 accepts them, anything else does not."""
    status: int

    def pack(self):
        return bytes((1, self.status))

    @classmethod
    def unpack(cls, read):
        version, status = read(2)
        expect_version('user name/password', version, 1)
        return cls(status)


class Request(NamedTuple):
    """A SOCKS5 request (RFC 1928 section 4); `command` may be one that we do not know."""
    command: int
    address: Address

    def pack(self):
        return bytes((5, self.command, 0)) + self.address.pack()

    @classmethod
    def unpack(cls, read):
        version, command, _ = read(3)   # RSV should be 0; real clients send other values
        expect_version('SOCKS', version, 5)
        return cls(command, Address.unpack(read))


class Response(NamedTuple):
    """A SOCKS5 reply (RFC 1928 section 6); `reply` may be a code that we do not know."""
    reply: int
    address: Address = UNSPECIFIED

    def pack(self):
        return bytes((5, self.reply, 0)) + self.address.pack()

    @classmethod
    def unpack(cls, read):
        version, reply, _ = read(3)
        expect_version('SOCKS', version, 5)
        return cls(reply, Address.unpack(read))


class Request4(NamedTuple):
    """A SOCKS4 request; a name as the host makes it SOCKS4a."""
    command: int
    address: Address
    userid: bytes = b''

    def pack(self):
        packed, name = ip_bytes(self.address.host), b''
        if packed is None:
            packed, name = b'\0\0\0\1', name_bytes(self.address.host) + b'\0'
        if len(packed) != 4:
            raise ValueError(f'{self.address.host}: SOCKS4 has no IPv6 addresses')
        return b''.join((bytes((4, self.command)), self.address.port.to_bytes(2, 'big'), packed,
                         self.userid, b'\0', name))

    @classmethod
    def unpack(cls, read):
        version, command = read(2)
        expect_version('SOCKS', version, 4)
        port, packed = int.from_bytes(read(2), 'big'), read(4)
        userid = cls._string(read, 'userid', MAX_USERID)
        if packed[:3] == b'\0\0\0' and packed[3]:
            host = name_text(cls._string(read, 'host name', MAX_NAME))
        else:
            host = ip_text(packed)
        return cls(command, Address(host, port), userid)

    @staticmethod
    def _string(read, name, limit):
        """The bytes up to the next NUL."""
        string = bytearray()
        while len(string) <= limit:
            byte = read(1)
            if byte == b'\0':
                return bytes(string)
            string += byte
        raise ProtocolError(f'SOCKS4 {name} of more than {limit} bytes')


class Response4(NamedTuple):
    """A SOCKS4 reply; its address can only be an IPv4 one."""
    code: int
    address: Address = UNSPECIFIED

    @classmethod
    def of(cls, reply, address=UNSPECIFIED):
        """The SOCKS4 reply that says what the SOCKS5 `reply` does."""
        if ':' in address.host:
            address = Address(UNSPECIFIED.host, address.port)
        return cls(Reply4.GRANTED if reply == Reply.SUCCEEDED else Reply4.REJECTED, address)

    def pack(self):
        return (bytes((0, self.code)) + self.address.port.to_bytes(2, 'big')
                + socket.inet_aton(self.address.host))

    @classmethod
    def unpack(cls, read):
        version, code = read(2)
        if version != 4:                # some servers send 4, which harms nobody
            expect_version('SOCKS4 reply', version, 0)
        port = int.from_bytes(read(2), 'big')
        return cls(code, Address(ip_text(read(4)), port))


class Datagram(NamedTuple):
    """A UDP datagram with the header it has between client and relay (RFC 1928 section 7)."""
    address: Address
    payload: bytes
    fragment: int = 0

    def pack(self):
        return b'\0\0%c%b%b' % (self.fragment, self.address.pack(), self.payload)

    @classmethod
    def unpack(cls, data):
        """From the bytes of one whole datagram; EOFError if they end within the header."""
        read, rest = reader(data)
        fragment = read(3)[2]           # RSV should be 0; real clients send other values
        return cls(Address.unpack(read), rest(), fragment)


# ---------------------------------------------------------------------------------------- sockets

# Of several attempts to connect, the error that says most about the target counts.
TELLING = {reply: rank for rank, reply in enumerate((
    Reply.CONNECTION_REFUSED, Reply.HOST_UNREACHABLE, Reply.NETWORK_UNREACHABLE,
    Reply.TTL_EXPIRED))}
BLOCKED = (BlockingIOError, InterruptedError)
UNDER_WAY = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}
ATTEMPT_DELAY = 0.25                    # seconds, RFC 8305 section 8
ATTEMPTS = 16                           # addresses of one name that are tried
LONGEST = 86400.0                       # seconds; systems bound how long one may wait
IP_BIND_ADDRESS_NO_PORT = 24            # Linux: choose the port at connect
V4_MAPPED = b'\0' * 10 + b'\xff\xff'
NEVER_RESOLVED = ('invalid', 'onion')   # RFC 6761 section 6.4, RFC 7686 section 2


def plain_ip(host):
    """`host` in the usual spelling if it is an IP address, a v4-mapped one as IPv4; else None."""
    packed = ip_bytes(host)
    if packed is None:
        return None
    return ip_text(packed[12:] if packed[:12] == V4_MAPPED else packed)


def canonical(address):
    """`address` as rules, resolver and log should see it.

    An IP address, which many clients send as a name, becomes a plain one; a name becomes lower-case
    ASCII without brackets and final dot.  ProtocolError for what can be neither.
    """
    host, port = address
    if host.startswith('[') and host.endswith(']'):
        host = host[1:-1]
    ip = plain_ip(host)
    if ip:
        return Address(ip, port)
    try:
        name = name_bytes(host).lower()
    except ValueError:
        raise ProtocolError(f'host name {shown(host)} is not text') from None
    name = name[:-1] if name.endswith(b'.') else name
    if not name or any(byte <= 32 or byte in b':%\x7f' for byte in name):
        raise ProtocolError(f'host name {shown(host)} is empty or has characters that no name has')
    return Address(name.decode(), port)


def shown(text):
    """`text` from a stranger, fit for one word of a log line."""
    return text if text and text.isprintable() and ' ' not in text else ascii(text)


# What takes time is a conversation: a generator that yields what it cannot go on without, a `Wait`
# for sockets or a `Call` that blocks, and is resumed with the result.  So it reads as straight
# lines; run() drives one in the thread that calls it, a `Loop` any number of them.  Its times are
# those of time.monotonic().

class Wait(NamedTuple):
    """Resume with those of the sockets that are ready, with none when the clock passes `until`."""
    reading: Sequence = ()
    writing: Sequence = ()
    until: Optional[float] = None


class Call(NamedTuple):
    """Resume with what function() returns or raises; socket.timeout after `until`."""
    function: Callable
    until: Optional[float] = None


def run(conversation):
    """Drive a conversation in this thread; its result."""
    advance, value = conversation.send, None
    while True:
        try:
            wish = advance(value)
        except StopIteration as stop:
            return stop.value
        try:
            value = wish.function() if isinstance(wish, Call) else poll(*wish)
            advance = conversation.send
        except Exception as error:
            advance, value = conversation.throw, error


def poll(reading, writing, until):
    """The answer to a `Wait`, in this thread."""
    seconds = until and min(LONGEST, max(0, until - time.monotonic()))
    if not hasattr(select, 'poll'):     # Windows
        return set().union(*select.select(reading, writing, writing, seconds))
    poller = select.poll()
    for sock in reading:
        poller.register(sock, select.POLLIN)
    for sock in writing:
        poller.register(sock, select.POLLOUT)
    found = {fd for fd, _ in poller.poll(seconds if seconds is None else int(seconds * 1000) + 1)}
    return [sock for sock in (*reading, *writing) if sock.fileno() in found]


def after(seconds):
    """The time so many seconds from now, for `until`; 0 or None: never."""
    return time.monotonic() + seconds if seconds else None


def ready(reading, writing, until, pause=None):
    """Conversation: those of the sockets that are ready; none after `pause` seconds.

    Raises socket.timeout when the clock has passed `until`.
    """
    limit = until
    if pause is not None:
        limit = min(after(pause), until or float('inf'))
    found = yield Wait(reading, writing, limit)
    if until and time.monotonic() >= until:     # also where somebody keeps the sockets busy
        raise socket.timeout('timed out')
    return found


def resolve(address, until=None):
    """Conversation: the IP addresses, a list of `Address`, that a canonical `address` stands for.

    Raises socket.gaierror.
    """
    host, port = address
    if ip_bytes(host) is not None:
        return [address]
    if host.rpartition('.')[2] in NEVER_RESOLVED:
        raise socket.gaierror(socket.EAI_NONAME, f'{host} is never resolved')
    found = yield Call(functools.partial(
        socket.getaddrinfo, host.encode(), port, 0, socket.SOCK_STREAM), until)
    hosts = (Address.of(sockaddr).host for *_, sockaddr in found)
    return list(dict.fromkeys(Address(plain_ip(host), port) for host in hosts))


class Stream:
    """Messages over a non-blocking socket, up to the time `until`.

    What a read brings beyond the message stays in `surplus`: first the next message, at last the
    first bytes of the tunnel.
    """
    SIZE = 4096                         # bytes; holds any handshake whole
    LARGEST = 1 << 16                   # surplus

    def __init__(self, sock, until):
        self.sock = sock
        self.until = until
        self.surplus = b''

    def _more(self):
        """Conversation: add what comes next to the surplus."""
        while True:
            try:
                data = self.sock.recv(self.SIZE)
                break
            except BLOCKED:
                yield from ready([self.sock], (), self.until)
        if not data:
            raise EOFError('the client left')
        self.surplus += data

    def read(self, unpack):
        """Conversation: what unpack(read) makes of the next bytes, however they are split.

        Raises EOFError if the peer ends within them, socket.timeout when it takes too long.
        """
        while True:
            read, rest = reader(self.surplus)
            try:
                message = unpack(read)
            except EOFError:
                yield from self._more()
            else:
                self.surplus = rest()
                return message

    def peek(self):
        """Conversation: the next byte, as a number; it stays there."""
        while not self.surplus:
            yield from self._more()
        return self.surplus[0]

    def wait_for(self, sockets, until):
        """Conversation: return when one of the sockets is readable, socket.timeout at `until`.

        Meanwhile take what the peer sends, up to LARGEST; EOFError if it ends.
        """
        while True:
            own = [self.sock] if len(self.surplus) < self.LARGEST else []
            found = yield from ready([*sockets, *own], (), until)
            if self.sock not in found:
                return
            yield from self._more()

    def write(self, message):
        """Conversation: send all of a message."""
        data = message.pack()
        while data:
            try:
                data = data[self.sock.send(data):]
            except BLOCKED:
                yield from ready((), [self.sock], self.until)

    def linger(self, until):
        """Conversation: end our side and wait for the peer to end its own.

        A close with unread bytes would send RST, which may overtake and destroy our last message.
        """
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while True:
                yield from ready([self.sock], (), until)
                if not self.sock.recv(self.SIZE):
                    break


def interleave(addresses):
    """The addresses, their families in turn, the first one's first (RFC 8305 section 4)."""
    family = family_of(addresses[0].host)
    first = [a for a in addresses if family_of(a.host) == family]
    other = [a for a in addresses if a not in first]
    turns = itertools.zip_longest(first, other)
    return [address for turn in turns for address in turn if address]


def start_connect(address, source):
    """A non-blocking socket whose connect to `address` is done or on its way, and which of these.

    `source` has the local addresses to use, at most one of a family; a family without one is then
    unreachable.
    """
    family = family_of(address.host)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if source:
            if sys.platform == 'linux':
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source_of(family, source), 0))
        error = sock.connect_ex(address)
        if error in UNDER_WAY:          # within this host it is done by now, if one asks
            error = sock.connect_ex(address)
        if error not in (0, errno.EISCONN, *UNDER_WAY):
            raise OSError(error, os.strerror(error))
        return sock, error not in UNDER_WAY
    except BaseException:
        sock.close()
        raise


def source_of(family, source):
    """The address of `family` in `source`; if that is empty, zeros: any of ours."""
    if not source:
        return '::' if family == socket.AF_INET6 else '0.0.0.0'
    for host in source:
        if family_of(host) == family:
            return host
    raise OSError(errno.ENETUNREACH, 'no source address of this family')


def dial(addresses, until=None, source=()):
    """Conversation: a non-blocking socket connected to the first address to answer (RFC 8305 5).

    An attempt starts as soon as one before it fails, or after ATTEMPT_DELAY seconds.  If all fail,
    the error that says most is raised, or the last one of those that say as much.
    """
    racing, errors = [], []
    try:
        winner = yield from race(deque(interleave(addresses)[:ATTEMPTS]), racing, errors, until,
                                 source)
    except socket.timeout as error:
        errors.append(error)
        winner = None
    finally:
        for loser in racing:
            loser.close()
    if winner:
        return winner
    raise min(reversed(errors), key=lambda error: TELLING.get(reply_for(error), len(TELLING)))


def race(waiting, racing, errors, until, source):
    """Conversation: the first socket to be connected; None if none is.

    Takes addresses from `waiting`; `racing` has the sockets that are under way, `errors` what
    became of others.
    """
    while waiting or racing:
        if waiting:
            try:
                sock, connected = start_connect(waiting.popleft(), source)
            except OSError as error:
                errors.append(error)
                continue
            if connected:
                return sock
            racing.append(sock)
        for sock in (yield from ready((), racing, until, ATTEMPT_DELAY if waiting else None)):
            racing.remove(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not error:
                return sock
            sock.close()
            errors.append(OSError(error, os.strerror(error)))
    return None


def bound(address, kind=socket.SOCK_STREAM):
    """A non-blocking socket bound to `address`, an IP address; a TCP one ready for listen()."""
    family = family_of(address.host)
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        if os.name != 'posix':          # Windows: there SO_REUSEADDR would share a port in use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        elif kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:   # systems differ in their default
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:  # accepted sockets inherit these two
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.bind(address)
        return sock
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f'cannot listen on {address}: {error.strerror}') from None


def bound_in(host, ports):
    """A UDP socket bound to `host` and a port of (lowest, highest); OSError if none is free."""
    lowest, highest = ports
    first = lowest + int.from_bytes(os.urandom(4), 'big') % (highest - lowest + 1)
    for port in itertools.chain(range(first, highest + 1), range(lowest, first)):
        try:
            return bound(Address(host, port), socket.SOCK_DGRAM)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f'no UDP port is free of {lowest} to {highest}')


# ----------------------------------------------------------------------------------------- access

class Settings(NamedTuple):
    """Everything that can be set, with its default.  Times are in seconds; 0 means no limit.

    users               name to password, bytes or text; without users nobody is asked
    open                serve strangers: listen beyond loopback although there are no users
    source              local IP addresses to connect from, at most one of a family
    advertise           IP addresses to name in replies to BIND and UDP ASSOCIATE instead of our
                        own, at most one of a family, for a proxy behind NAT
    udp_ports           (lowest, highest) that clients send datagrams to; (0, 0): any
    udp_strict          pass on datagrams only from where the client has sent some
    tor_extensions      offer Tor's RESOLVE and RESOLVE_PTR
    handshake_timeout   from accept to the whole request
    connect_timeout     for connecting to the target, all its addresses together
    bind_timeout        for the peer that BIND waits for
    idle_timeout        for a tunnel through which nothing moves
    udp_timeout         for an association without datagrams
    max_clients         clients at once; further ones wait in the listen queue
    """
    users: Mapping[Union[bytes, str], Union[bytes, str]] = MappingProxyType({})
    open: bool = False
    source: Tuple[str, ...] = ()
    advertise: Tuple[str, ...] = ()
    udp_ports: Tuple[int, int] = (0, 0)
    udp_strict: bool = False
    tor_extensions: bool = False
    handshake_timeout: float = 30.0
    connect_timeout: float = 30.0
    bind_timeout: float = 120.0
    idle_timeout: float = 0.0
    udp_timeout: float = 300.0
    max_clients: int = 0

    def __repr__(self):
        fields = ', '.join(f'{name}={value!r}' for name, value in zip(self._fields, self)
                           if name != 'users')
        return f'Settings({len(self.users)} users, {fields})'       # and no passwords


# What only the proxy's own host should reach: itself, its link (there also live the metadata
# services of clouds), groups, and addresses that are not one host's.
LOCAL_NETWORKS = [ipaddress.ip_network(network) for network in (
    '0.0.0.0/8', '127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '240.0.0.0/4',
    '::/128', '::1/128', 'fe80::/10', 'ff00::/8', 'fd00:ec2::254/128')]

# IPv6 networks whose addresses carry an IPv4 one: its place, in bytes.
EMBEDDED = {
    ipaddress.ip_network('::ffff:0:0/96'): 12,          # v4-mapped, RFC 4291
    ipaddress.ip_network('::/96'): 12,                  # v4-compatible, RFC 4291
    ipaddress.ip_network('64:ff9b::/96'): 12,           # NAT64, RFC 6052
    ipaddress.ip_network('2002::/16'): 2,               # 6to4, RFC 3056
}


@functools.lru_cache(4096)
def is_local(host):
    """Whether the IP address `host`, or an IPv4 address within it, is in LOCAL_NETWORKS."""
    ip = ipaddress.ip_address(host)
    ips = [ip] + [ipaddress.ip_address(ip.packed[place:place + 4])
                  for network, place in EMBEDDED.items() if ip in network]
    return any(ip in network for ip in ips for network in LOCAL_NETWORKS)


@functools.lru_cache(4096)
def is_loopback(host):
    """Whether the IP address `host` is of this host alone."""
    return ipaddress.ip_address(host).is_loopback


def is_ours(host):
    """Whether the IP address `host` is one of this machine's."""
    with socket.socket(family_of(host), socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((host, 0))
        except OSError:
            return False
        return True


def authorize(client, command, target, listeners):
    """Raise Refused unless `client` may reach `target`; all are IP addresses with ports.

    A client on this host may reach anything.  Any other must not use the proxy to reach
    LOCAL_NETWORKS, or the proxy (`listeners`) itself; nor BIND for anybody, which is what a target
    of zeros means there.
    """
    if target.host in ('0.0.0.0', '::') and command != Command.BIND:
        raise Refused(f'{target.host} is no host', reply=Reply.GENERAL_FAILURE)
    if is_loopback(client.host):
        return
    if is_local(target.host):
        raise Refused(f'{target.host} is local to the proxy')
    if any(target.port == listener.port for listener in listeners) and is_ours(target.host):
        raise Refused(f'{target} is the proxy itself')


def authenticated(users, credentials):
    """Whether `credentials` are one of the users', in a time that does not tell why not."""
    import hmac                         # here, because few servers need it and it is large
    password = users.get(credentials.username, b'')
    same = hmac.compare_digest(credentials.password, password)
    return same and credentials.username in users


# ------------------------------------------------------------------------------------------ loops

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Waker:
    """A socket that is readable from wake(), which any thread may call, to clear()."""

    def __init__(self):
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self):
        return self._reader.fileno()

    def wakeup_fd(self):
        """For signal.set_wakeup_fd()."""
        return self._writer.fileno()

    def wake(self):
        with contextlib.suppress(OSError):      # full: it is awake already
            self._writer.send(b'\0')

    def clear(self):
        with contextlib.suppress(OSError):
            self._reader.recv(4096)

    def close(self):
        self._reader.close()
        self._writer.close()


class Timers:
    """At most one time for each item, kept in its attribute `due`, to the next TICK.

    Items wait in one set for each tick, so that setting a time and dropping it cost the same
    however many there are, and nothing is left of an item that ended early.
    """
    TICK = 0.05                         # seconds

    def __init__(self):
        self._ticks = {}
        self._first = float('inf')      # no set is earlier

    def set(self, item, when):
        """Have the item's time be `when`; None for no time."""
        tick = when and int(when / self.TICK) + 1
        if tick != item.due:
            if item.due in self._ticks:
                self._ticks[item.due].discard(item)
                if not self._ticks[item.due]:
                    del self._ticks[item.due]
            item.due = tick
            if tick:
                self._ticks.setdefault(tick, set()).add(item)
                self._first = min(self._first, tick)

    def pause(self, now):
        """Seconds until there may be something to do; None if there never is."""
        return min(LONGEST, max(0, self._first * self.TICK - now)) if self._ticks else None

    def expired(self, now):
        """The items whose time has passed; they have none then."""
        if now < self._first * self.TICK:
            return []
        ticks = [tick for tick in self._ticks if tick * self.TICK <= now]
        items = [item for tick in sorted(ticks) for item in self._ticks.pop(tick)]
        self._first = min(self._ticks, default=float('inf'))
        for item in items:
            item.due = None
        return items


class Loop:
    """One selector, and one thread at a time in run(), for any number of items.

    An item is a `Task` or a relay.  It has

    client                 whom it serves, or None
    due                    for `Timers`
    ready(sock, events)    a socket that it watches is ready
    expire()               its time has passed
    close(outcome)         give everything back

    Other threads use only call() and stop().  `crew` does what blocks.  relieve(tunnel), if there
    is one, is called for a tunnel that turned out to carry much.
    """
    BUFFER = 1 << 20                    # bytes that one read can bring
    client = None                       # as an item of itself, for its waker

    def __init__(self, crew=None, relieve=None):
        self.crew = crew
        self.relieve = relieve
        self.items = set()
        self.timers = Timers()
        self.now = time.monotonic()     # as of this round of events
        self.buffer = memoryview(bytearray(self.BUFFER))
        self.held = 0                   # bytes that relays hold because nobody takes them
        self._inbox = deque()
        self._asleep = False
        self._stopping = False
        self.closed = False
        self.waker = Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.waker, READ, self)

    def call(self, item, function, *args):
        """Call function(*args) on behalf of `item`, after the events of this round."""
        self._inbox.append((item, function, args))
        if self._asleep:
            self.waker.wake()

    def watch(self, sock, before, wanted, item):
        """Watch `sock` for the events `wanted` instead of those `before`, on behalf of `item`.

        With nothing wanted it is not watched at all: a poll for no events still reports a hang-up,
        again and again.
        """
        if not before:
            if wanted:
                self._selector.register(sock, wanted, item)
        elif wanted:
            self._selector.modify(sock, wanted, item)
        else:
            self._selector.unregister(sock)

    def run(self):
        """Serve the items until stop()."""
        timers = self.timers
        while not self._stopping:
            self._asleep = True         # before the look at the inbox: call() may come in between
            found = self._selector.select(
                0 if self._inbox else timers.pause(time.monotonic()))
            self._asleep = False
            self.now = time.monotonic()
            for key, events in found:
                self.attempt(key.data, key.data.ready, key.fileobj, events)
            for item in timers.expired(self.now):
                self.attempt(item, item.expire)
            while self._inbox:
                item, function, args = self._inbox.popleft()
                self.attempt(item, function, *args)
        self._stopping = False

    def stop(self):
        """Have run() return."""
        self._stopping = True
        self.waker.wake()

    def close(self):
        """Close all items; no thread may be in run()."""
        self.closed = True
        for item in [*(item for item, _, _ in self._inbox), *self.items]:
            self.attempt(item, item.close, 'server closed')
        self._selector.close()
        self.waker.close()

    @staticmethod
    def attempt(item, function, *args):
        """Call function(*args) on behalf of `item`; what happens to one must not end the others."""
        try:
            function(*args)
        except Exception:
            log.exception('%s: this is a bug', item.client and item.client.address)
            with contextlib.suppress(Exception):
                item.close('failed')

    def ready(self, *_):
        """The waker is; the loop watches it as an item does its sockets."""
        self.waker.clear()


class Task:
    """A conversation in a loop, and the client's socket, which it owns.

    The conversation's result is a relay, which takes the socket over, or None.
    """
    __slots__ = ('client', 'loop', 'due', '_sock', '_events', '_conversation', '_wish', '_call')

    def __init__(self, client, sock, conversation):
        self.client = client
        self.due = None
        self._sock = sock
        self._events = 0                # that it is watched for
        self._conversation = conversation
        self._wish = Wait()
        self._call = None               # what the crew is at

    def start(self, loop):
        self.loop = loop
        loop.items.add(self)
        self._step(self._conversation.send, None)

    def ready(self, sock, _):
        if sock in self._wish.reading or sock in self._wish.writing:
            self._step(self._conversation.send, [sock])
        elif sock is self._sock and self._conversation:     # not now; _watch() looks again
            self.loop.watch(sock, self._events, 0, self)
            self._events = 0

    def expire(self):
        if self._call:
            self._step(self._conversation.throw, socket.timeout('timed out'))
        else:
            self._step(self._conversation.send, [])

    def close(self, outcome):
        """End the conversation where it stands, with no more than one last word to the client."""
        if self._conversation:
            with contextlib.suppress(Exception):
                self._step(self._conversation.throw, OSError(errno.ECANCELED, outcome))
        if self._conversation:
            self._conversation.close()
            self._end(None)

    def _step(self, advance, value):
        """Resume the conversation and see to what it wants next."""
        self._unwatch()
        self._wish, self._call = Wait(), None
        try:
            wish = advance(value)
        except StopIteration as stop:
            return self._end(stop.value)
        self.loop.timers.set(self, wish.until)
        if isinstance(wish, Call):
            self._call = wish
            try:
                self.loop.crew.run(self._work, wish)
            except RuntimeError as error:           # no thread to be had
                self._step(self._conversation.throw, OSError(errno.EAGAIN, str(error)))
        else:
            self._wish = wish
            self._watch()

    def _work(self, call):
        """In a thread of the crew."""
        value = error = None
        if call is self._call:          # it is still waited for
            try:
                value = call.function()
            except Exception as caught:
                error = caught
            self.loop.call(self, self._resume, call, value, error)

    def _resume(self, call, value, error):
        if call is not self._call:
            return
        if error:
            self._step(self._conversation.throw, error)
        else:
            self._step(self._conversation.send, value)

    # The client's socket stays watched between waits, which saves system calls; others may be
    # closed by the conversation, so it gets them back unwatched.

    def _watch(self):
        for sockets, wanted in (self._wish.reading, READ), (self._wish.writing, WRITE):
            for sock in sockets:
                if sock is not self._sock:
                    self.loop.watch(sock, 0, wanted, self)
                elif wanted != self._events:
                    self.loop.watch(sock, self._events, wanted, self)
                    self._events = wanted

    def _unwatch(self):
        for sock in (*self._wish.reading, *self._wish.writing):
            if sock is not self._sock:
                self.loop.watch(sock, READ, 0, self)

    def _end(self, relay):
        self._unwatch()
        self._conversation = None
        self.loop.timers.set(self, None)
        self.loop.items.discard(self)
        if relay:
            self.loop.attempt(relay, relay.start, self.loop, self._events)
        else:
            self.loop.watch(self._sock, self._events, 0, self)
            self._sock.close()


class Crew:
    """Threads that do what blocks; a free one waits a while for the next job before it ends."""

    def __init__(self, size=64, patience=5.0):
        self._size = size
        self._patience = patience       # seconds
        self._jobs = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = set()
        self._free = 0                  # threads that wait, less the jobs that do

    def run(self, *job):
        """Call job[0](*job[1:]) in some thread; RuntimeError if there is none and none starts."""
        with self._lock:
            if self._free <= 0 and len(self._threads) < self._size:
                thread = threading.Thread(target=self._work, args=(job,), name='socks-crew',
                                          daemon=True)
                thread.start()
                self._threads.add(thread)
            else:
                self._free -= 1
                self._jobs.put(job)

    def _work(self, job):
        while job:
            function, *args = job
            try:
                function(*args)
            except Exception:
                log.exception('this is a bug')
            job = function = args = None            # hold nothing while waiting
            with self._lock:
                self._free += 1
            job = self._next()
        self._threads.discard(threading.current_thread())

    def _next(self):
        try:
            return self._jobs.get(timeout=self._patience)
        except Empty:
            with self._lock:
                if self._free > 0:
                    self._free -= 1
                    return None
            return self._jobs.get()                 # it came at the last moment

    def dismiss(self):
        """Have all threads end as soon as they are free."""
        self._patience = 0
        with self._lock:
            for _ in range(max(0, self._free)):
                self._free -= 1
                self._jobs.put(None)


# ----------------------------------------------------------------------------------------- relays

RESET = struct.pack('ii', 1, 0)         # SO_LINGER, on, 0 seconds: close sends RST


class Relay:
    """What a loop carries for a client after the conversation; closes its sockets at its end.

    `moved` is when something last did, in the loop's time; after `patience` seconds without, the
    relay ends.
    """
    __slots__ = ('client', 'loop', 'due', 'moved')

    def __init__(self, client):
        self.client = client
        self.due = None

    def begin(self, loop):
        """Belong to `loop`."""
        self.loop = loop
        self.moved = loop.now
        loop.items.add(self)
        self.expire()

    def expire(self):
        """Close what is idle; come back when it may be."""
        if self.patience and self.moved + self.patience <= time.monotonic():
            self.close('idle')
        elif self.patience:
            self.loop.timers.set(self, self.moved + self.patience)

    def leave(self):
        """Belong to no loop."""
        self.loop.timers.set(self, None)
        self.loop.items.discard(self)


class Pipe:
    """One direction of a `Tunnel`: what `source` sends goes to `sink`.

    hungry    waits for the source; holds nothing
    loaded    holds what the sink did not take, and waits for it; reads nothing meanwhile
    done      the source has ended, or the sink is gone
    """
    # One read takes `size` bytes at most: more while the source fills it, because few large system
    # calls are what makes it fast; little at first and after the sink did not take all, and when
    # the loop holds much already, so that many slow sinks cannot make it hold more and more.
    SMALLEST, LARGEST = 1 << 14, Loop.BUFFER
    HELD = 1 << 26

    __slots__ = ('tunnel', 'source', 'sink', 'twin', 'load', 'done', 'size', 'count', 'events')

    def __init__(self, tunnel, source, sink, load=b''):
        self.tunnel = tunnel
        self.source = source
        self.sink = sink
        self.twin = None                # the other direction
        self.load = load
        self.done = False
        self.size = self.SMALLEST
        self.count = len(load)          # bytes taken from the source
        self.events = 0                 # what the loop watches the source for

    def ready(self, _, events):
        """The loop saw `events` at the source, which is also the twin's sink."""
        events &= self.events           # an earlier one of the same round may have changed them
        if events & READ:
            self.fill()
        if events & WRITE:
            self.twin.flush()

    def fill(self):
        """Read once, and pass on at once what was read."""
        loop = self.tunnel.loop
        try:
            count = self.source.recv_into(
                loop.buffer, self.size if loop.held < self.HELD else self.SMALLEST)
        except BLOCKED:
            return
        except OSError as error:
            return self.tunnel.close(reason(error), reset=True)
        if not count:
            return self.end()
        self.tunnel.moved = loop.now
        self.count += count
        if count == self.size < self.LARGEST:
            self.grow()
        self.pour(loop.buffer[:count])
        if self.load:
            self.size = self.SMALLEST
            self.load = memoryview(bytes(self.load))    # the buffer is the whole loop's
            self.tunnel.watch()

    def grow(self):
        self.size *= 4
        loop = self.tunnel.loop
        if self.size == self.LARGEST and loop.relieve:
            loop.call(self.tunnel, loop.relieve, self.tunnel)

    def flush(self):
        """Send what is loaded."""
        if self.load:
            self.tunnel.moved = self.tunnel.loop.now
            self.pour(self.load)
            self.tunnel.watch()

    def pour(self, data):
        """Send `data`; what the sink does not take is the load."""
        try:
            sent = self.sink.send(data)
        except BLOCKED:
            sent = 0
        except OSError as error:
            return self.lose(error)
        self.keep(data[sent:] if sent < len(data) else b'')

    def keep(self, load):
        self.tunnel.loop.held += len(load) - len(self.load)
        self.load = load

    def end(self):
        """The source has said all: tell the sink; the other direction goes on (half-close)."""
        self.done = True
        if not self.twin.done:                  # else the tunnel's close says it
            with contextlib.suppress(OSError):  # a sink that is gone is the twin's to notice
                self.sink.shutdown(socket.SHUT_WR)
        self.tunnel.watch()

    def lose(self, error):
        """The sink is gone.  What it sent before that is still to be read: the twin goes on."""
        self.done = True
        self.keep(b'')
        self.tunnel.error = error
        self.tunnel.watch()

    def wanted(self):
        """What this pipe and its twin wait for at the source."""
        return (0 if self.load or self.done else READ) | (WRITE if self.twin.load else 0)

    def watch(self):
        wanted = self.wanted()
        if wanted != self.events:
            self.tunnel.loop.watch(self.source, self.events, wanted, self)
            self.events = wanted

    def close(self, outcome):
        self.tunnel.close(outcome)


class Tunnel(Relay):
    """Two sockets, joined; owns both from its making on.

    Ends when both directions are done, when a side resets (which is passed on as a reset), when
    nothing has moved for too long, or with its loop.
    """
    __slots__ = ('up', 'down', 'error')

    def __init__(self, client, near, far, surplus=b''):
        super().__init__(client)
        self.up = Pipe(self, near, far, surplus)
        self.down = Pipe(self, far, near)
        self.up.twin, self.down.twin = self.down, self.up
        self.error = None               # what took one side away

    @property
    def patience(self):
        return self.client.server.settings.idle_timeout

    def start(self, loop, near_events=0):
        """Go on in `loop`, which watches the client's socket for `near_events` already."""
        self.begin(loop)
        loop.held += len(self.up.load) + len(self.down.load)
        self.up.events = near_events
        for pipe in (self.up, self.down):
            loop.watch(pipe.source, pipe.events, pipe.wanted(), pipe)
            pipe.events = pipe.wanted()
        self.up.flush()

    def move(self, loop):
        """Go on in another loop."""
        self.leave()
        self.loop = loop
        loop.call(self, self.start, loop)

    def leave(self):
        super().leave()
        for pipe in (self.up, self.down):
            self.loop.watch(pipe.source, pipe.events, 0, pipe)
            pipe.events = 0
        self.loop.held -= len(self.up.load) + len(self.down.load)

    def watch(self):
        if not (self.up.done and self.down.done):
            self.up.watch()
            self.down.watch()
        elif self.error:
            self.close(reason(self.error), reset=True)
        else:
            self.close('done')

    def close(self, outcome, reset=False):
        """Close both sockets, by RST if asked to; only the first call counts."""
        client, self.client = self.client, None
        if not client:
            return
        self.leave()
        for pipe in (self.up, self.down):
            pipe.done, pipe.load = True, b''
            if reset:
                with contextlib.suppress(OSError):
                    pipe.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            pipe.source.close()
        client.end(outcome, self.up.count, self.down.count)


class Reassembly:
    """The queue of the fragments of one datagram (RFC 1928 section 7)."""
    PATIENCE = 10.0                     # seconds; the RFC wants 5 at least
    LARGEST = 65507                     # bytes, what one UDP datagram over IPv4 can carry

    def __init__(self):
        self.position = 0               # of the last fragment; 0: the queue is empty

    def add(self, datagram, now):
        """The whole datagram if this is its last fragment, else None.

        A datagram that is none abandons the queue, as does a fragment that cannot follow.
        """
        position, last = datagram.fragment & 0x7F, datagram.fragment & 0x80
        if position == self.position > 1 and now <= self._end:
            return None                 # the same again
        if position != self.position + 1 or self.position and now > self._end:
            self.position = 0
        if not datagram.fragment:
            return datagram
        if position == 1:
            self._address, self._parts, self._end = datagram.address, [], now + self.PATIENCE
        elif not self.position or datagram.address != self._address:
            self.position = 0
            return None
        self.position = position
        self._parts.append(datagram.payload)
        if sum(map(len, self._parts)) > self.LARGEST:
            self.position = 0
        elif last:
            self.position = 0
            return Datagram(self._address, b''.join(self._parts))
        return None


class Routes:
    """Which way one client's datagrams go, and from whom answers may come.

    The bytes of a header are the key to its route, so that a target is unpacked, resolved and
    judged once, and the address of a sender is the key to the header of its answers.  `relay` is
    the `UdpRelay` that sends.
    """
    LIMIT = 1024                        # targets, and senders, that are known at a time
    LOOKUPS = 8                         # at a time
    QUEUE = 64                          # datagrams that wait for them
    RETRY = 5.0                         # seconds until a failed look-up is tried again

    def __init__(self, relay):
        self.relay = relay
        self.known = {}                 # header: (socket, address) of the target
        self.headers = {}               # address of a sender: header
        self._queues = {}               # header: payloads that wait for its look-up
        self._failed = {}               # header: when to try again

    def follow(self, header, datagram):
        """Send the payload of `datagram` now, or when the way is found."""
        if header in self.known:
            self.relay.send(self.known[header], datagram.payload)
        elif header in self._queues:
            self._queue(header, datagram.payload)
        elif self._failed.get(header, 0) > self.relay.loop.now:
            self.relay.drop('its target failed a moment ago')
        else:
            self._find(header, datagram)

    def _find(self, header, datagram):
        try:
            address = canonical(datagram.address)
        except ProtocolError as error:
            return self.relay.drop(error)
        literal = ip_bytes(address.host) is not None
        if not literal and len(self._queues) >= self.LOOKUPS:
            return self.relay.drop('too many names are looked up')
        self._queues[header] = []
        self._queue(header, datagram.payload)
        if literal:
            return self._found(header, [address])
        try:
            self.relay.loop.crew.run(self._look_up, header, address)
        except RuntimeError:            # no thread to be had
            self._found(header, [])

    def _queue(self, header, payload):
        if sum(map(len, self._queues.values())) < self.QUEUE:
            self._queues[header].append(payload)
        else:
            self.relay.drop('too many wait for look-ups')

    def _look_up(self, header, address):
        """In a thread of the crew."""
        addresses = []
        if self.relay.client:           # it is still waited for
            with contextlib.suppress(OSError):
                addresses = run(resolve(address))
        self.relay.loop.call(self.relay, self._found, header, addresses)

    def _found(self, header, addresses):
        """Send what waits to the first address that may be reached and can be, and remember it."""
        payloads = self._queues.pop(header)
        client, why = self.relay.client, 'its name was not found'
        for address in addresses if client else ():
            try:
                client.server.authorize(client, address)
                route = self.relay.far_socket(address.host), address
            except OSError as error:
                why = reason(error)
                continue
            self._learn(header, route)
            for payload in payloads:
                self.relay.send(route, payload)
            return
        if client:                      # else it ended meanwhile
            for _ in payloads:
                self.relay.drop(why)
            if len(self._failed) >= self.LIMIT:
                self._failed.clear()
            self._failed[header] = self.relay.loop.now + self.RETRY

    def _learn(self, header, route):
        if max(len(self.known), len(self.headers)) >= self.LIMIT:
            self.known.clear()          # both, because who is sent to may answer
            self.headers.clear()
        self.known[header] = route
        self.headers[tuple(route[1])] = Datagram(route[1], b'').pack()

    def meet(self, source):
        """The header for a sender to whom the client did not send, if that is allowed."""
        if self.relay.client.server.settings.udp_strict:
            return None
        if len(self.headers) >= self.LIMIT:
            self.headers.clear()
        self.headers[source] = Datagram(Address.of(source), b'').pack()
        return self.headers[source]


class UdpRelay(Relay):
    """The datagrams of one client, to any targets and back (RFC 1928 section 7).

    control    the client's TCP connection, whose end is the relay's
    near       the UDP socket for the client
    hint       the address that the client says it will send from, as far as it knows

    Datagrams count only from the client's IP address, and from the port that it announced; but if
    it did not, or not with this address, so that the port may be another on the way here, from
    that which is used first, until the announced one is.  Once that is settled, `near` is
    connected and the system keeps strangers away.  A datagram that goes wrong is never answered.
    """
    BATCH = 64                          # datagrams before others get their turn
    ROOM = 22                           # bytes of the longest header of an answer

    def __init__(self, client, control, near, hint):
        super().__init__(client)
        self.control = control
        self.near = near
        self.hint = hint
        self.owner = None               # the client's UDP address, once it sent
        self.connected = False
        self.far = {}                   # family: the socket that targets see
        self.routes = Routes(self)
        self.reassembly = Reassembly()
        self.up = self.down = self.dropped = 0

    @property
    def patience(self):
        return self.client.server.settings.udp_timeout

    def start(self, loop, control_events=0):
        self.begin(loop)
        loop.watch(self.control, control_events, READ, self)
        loop.watch(self.near, 0, READ, self)

    def ready(self, sock, _):
        if not self.client:             # closed by an earlier event of this round
            return
        if sock is self.control:
            self.listen()
        elif sock is self.near:
            self.from_client()
        else:
            self.from_target(sock)

    def listen(self):
        """What a client says on its TCP connection means nothing, but that it ends does."""
        try:
            if self.control.recv(4096):
                return
        except BLOCKED:
            return
        except OSError as error:
            return self.close(reason(error))
        self.close('done')

    # From the client

    def from_client(self):
        buffer, known = self.loop.buffer, self.routes.known
        for _ in range(self.BATCH):
            try:
                count, source = self.near.recvfrom_into(buffer)
            except BLOCKED:
                return
            except OSError:             # of an earlier send
                continue
            end = self.header_end(buffer, count)
            if end > count or source != self.owner and not self.admit(source):
                self.drop('malformed, or not the client:', source)
                continue
            self.moved = self.loop.now
            header = bytes(buffer[:end])
            route = known.get(header)
            if route and not self.reassembly.position:
                self.send(route, buffer[end:count])
            else:
                self.take(header, bytes(buffer[end:count]))

    @staticmethod
    def header_end(data, count):
        """Where the header of a datagram of `count` bytes ends; beyond them if it has none."""
        if count > 4:
            kind = data[3]
            if kind == AddressType.IPV4:
                return 10
            if kind == AddressType.DOMAINNAME:
                return 7 + data[4]
            if kind == AddressType.IPV6:
                return 22
        return count + 1

    def admit(self, source):
        """Whether a valid datagram from elsewhere than the owner is the client's."""
        if Address.of(source).host != self.client.address.host:
            return False
        announced = source[1] == self.hint.port
        if not announced and (self.owner or self.hint.host == self.client.address.host):
            return False
        self.owner = source
        if announced or not self.hint.port:
            with contextlib.suppress(OSError):
                self.near.connect(source)
                self.connected = True
        return True

    def take(self, header, payload):
        """A datagram that is a fragment, or whose route is not known."""
        datagram = self.reassembly.add(
            Datagram(Address.unpack(reader(header[3:])[0]), payload, header[2]), self.loop.now)
        if datagram:
            self.routes.follow(b'\0\0\0' + header[3:], datagram)

    def far_socket(self, host):
        """The socket for targets of the family of `host`."""
        family = family_of(host)
        if family not in self.far:
            source = source_of(family, self.client.server.settings.source)
            sock = self.far[family] = bound(Address(source, 0), socket.SOCK_DGRAM)
            self.loop.watch(sock, 0, READ, self)
        return self.far[family]

    def send(self, route, payload):
        sock, address = route
        try:
            sock.sendto(payload, address)
            self.up += len(payload)
        except OSError as error:
            self.drop(reason(error))

    # To the client.  The header of an answer goes into the room before it, so that nothing is
    # copied.

    def from_target(self, sock):
        buffer, headers = self.loop.buffer, self.routes.headers
        for _ in range(self.BATCH):
            try:
                count, source = sock.recvfrom_into(buffer[self.ROOM:])
            except BLOCKED:
                return
            except OSError:             # of an earlier send
                continue
            header = headers.get(source[:2]) or self.routes.meet(source[:2])
            if not header:
                self.drop('nothing was sent to', source)
                continue
            self.moved = self.loop.now
            start = self.ROOM - len(header)
            buffer[start:self.ROOM] = header
            self.answer(buffer[start:self.ROOM + count], count)

    def answer(self, datagram, count):
        try:
            if self.connected:
                self.near.send(datagram)
            else:
                self.near.sendto(datagram, self.owner)
            self.down += count
        except OSError as error:        # too large with its header, or nobody listens any more
            self.drop(reason(error))

    def drop(self, *why):
        self.dropped += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug('%s: datagram dropped: %s', self.client.address, ' '.join(map(str, why)))

    def close(self, outcome):
        client, self.client = self.client, None
        if client:
            self.leave()
            for sock in (self.control, self.near, *self.far.values()):
                self.loop.watch(sock, READ, 0, self)
                sock.close()
            if self.dropped:
                outcome = f'{outcome}, {self.dropped} datagrams dropped'
            client.end(outcome, self.up, self.down)


# ----------------------------------------------------------------------------------------- server

LINGER = 2.0                            # seconds, see Stream.linger
ACCEPT_BATCH = 64                       # connections accepted before others get their turn
ACCEPT_PAUSE = 0.1                      # seconds until the next try when there is no room
NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
DESCRIPTORS_KEPT = 32                   # for all that is not a client

HTTP_PAGE = b"""\
HTTP/1.0 501 Not Implemented\r
Content-Type: text/plain; charset=us-ascii\r
Connection: close\r
\r
This port speaks SOCKS4, SOCKS4a and SOCKS5, not HTTP.\r
Set it in your program as a SOCKS proxy (socks5h://...), not as an HTTP proxy.\r
"""


class HttpPage(NamedTuple):
    """The answer to a program that takes us for an HTTP proxy."""

    def pack(self):
        return HTTP_PAGE


class Client:
    """What is known of one client, from accept to the log line at its end."""
    __slots__ = ('server', 'address', 'protocol', 'user', 'command', 'target', 'started')

    def __init__(self, server, address):
        self.server = server
        self.address = address
        self.protocol = self.user = self.target = '-'
        self.command = None             # a `Command`
        self.started = time.monotonic()

    def end(self, outcome, up=0, down=0):
        """Write the client's line, if there is an outcome.

        up and down are the bytes that came from the client and from the target.
        """
        self.server.client_ended()
        if outcome:
            log.info('%s %s %s %s %s: %s, %d bytes up, %d down, %.3f s', self.address, self.user,
                     self.protocol, self.command.name if self.command else '-', self.target,
                     outcome, up, down,
                     time.monotonic() - self.started)


class Negotiation(socketserver.BaseRequestHandler):
    """What is said with one client, up to its relay or its refusal; all of it conversations.

    converse: negotiate, then command(request) of the subclass, whose result is the relay.
    """

    def __init__(self, request, client, server):
        self.request = request
        self.client = client
        self.client_address = client.address
        self.server = server
        self.settings = server.settings
        self.stream = Stream(request, after(self.settings.handshake_timeout))
        self.answer_form = None         # (reply, bound address) -> the message that says so now
        self.outcome = None             # the end of the client's log line; None: no line

    def converse(self):
        relay = None
        try:
            relay = yield from self.handle()
        finally:
            if relay is None:
                self.client.end(self.outcome)
        return relay

    def handle(self):
        try:
            request = yield from self.negotiate()
        except ProxyError as error:
            return (yield from self.refuse(error))
        except (OSError, EOFError) as error:    # the client's own connection: nobody to answer
            self.outcome = self.answer_form and f'no request: {reason(error)}'
            return None
        try:
            return (yield from self.command(request))
        except OSError as error:                # on the way to the target
            return (yield from self.refuse(error))
        except EOFError as error:
            self.outcome = reason(error)
            return None

    def answer(self, reply, address=UNSPECIFIED):
        return self.stream.write(self.answer_form(reply, address))

    def refuse(self, error):
        """Tell the client why not, in the form that it expects at this point."""
        verb = 'refused' if isinstance(error, ProxyError) else 'failed'
        self.outcome = f'{verb}: {reason(error)}'
        address = isinstance(error, Refused) and error.address or UNSPECIFIED
        if self.answer_form:
            with contextlib.suppress(OSError):
                yield from self.answer(reply_for(error), address)
                yield from self.stream.linger(after(LINGER))

    def negotiate(self):
        """The client's request, after all that comes before it."""
        first = yield from self.stream.peek()
        if first == 4:
            return (yield from self.negotiate4())
        if first == 5:
            return (yield from self.negotiate5())
        if first in b'CDGHOPT':                 # CONNECT, DELETE, GET, ...
            self.answer_form = lambda *_: HttpPage()
            raise ProtocolError('HTTP, expected SOCKS')
        if first == 0x16:
            raise ProtocolError('TLS, expected SOCKS')
        raise ProtocolError(f'first byte {first:#04x}, expected 0x04 or 0x05')

    def negotiate4(self):
        self.client.protocol = 'SOCKS4'
        self.answer_form = Response4.of
        request = yield from self.stream.read(Request4.unpack)
        if self.settings.users:
            raise Refused('SOCKS4 has no passwords, expected SOCKS5')
        return request

    def negotiate5(self):
        self.client.protocol = 'SOCKS5'
        self.answer_form = lambda *_: Choice(Method.NO_ACCEPTABLE)
        greeting = yield from self.stream.read(Greeting.unpack)
        method = self.choose(greeting.methods)
        yield from self.stream.write(Choice(method))
        if method == Method.USERNAME_PASSWORD:
            self.answer_form = lambda *_: Verdict(1)
            self.authenticate((yield from self.stream.read(Credentials.unpack)))
            yield from self.stream.write(Verdict(0))
        self.answer_form = Response
        return (yield from self.stream.read(Request.unpack))

    def choose(self, offered):
        """The authentication method to use, of those offered.

        Without users, a client that insists on a password may send any.
        """
        for method in (Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD):
            if method in offered and (method or not self.settings.users):
                return method
        raise Refused(f'methods offered: {offered.hex() or "none"}, expected '
                      f'{"02, a password" if self.settings.users else "00 or 02"}')

    def authenticate(self, credentials):
        if self.settings.users:
            self.client.user = shown(name_text(credentials.username))
            if not authenticated(self.settings.users, credentials):
                raise Refused('wrong user name or password')


class Handler(Negotiation):
    """What a client can ask for: a method do_COMMAND for each `Command`.

    One that is not there, or that the settings switch off, is refused as not supported.
    """

    def command(self, request):
        command = self.client.command = self.known(request)
        self.client.target = shown(str(request.address))
        log.debug('%s: %s %s', self.client.address, command.name, self.client.target)
        return getattr(self, 'do_' + command.name)(request)

    def known(self, request):
        """The command, if there is such a one here."""
        try:
            command = Command(request.command)
        except ValueError:
            command = None
        theirs = not isinstance(request, Request4) or command in (
            Command.CONNECT, Command.BIND, Command.RESOLVE)
        ours = self.settings.tor_extensions or command not in (
            Command.RESOLVE, Command.RESOLVE_PTR)
        if command and theirs and ours and hasattr(self, 'do_' + command.name):
            return command
        raise ProtocolError(f'command {request.command:#04x} is not supported',
                            reply=Reply.COMMAND_NOT_SUPPORTED)

    def do_CONNECT(self, request):
        if not request.address.port:
            raise ProtocolError('port 0, expected 1 to 65535')
        until = self.stream.until = after(self.settings.connect_timeout)
        addresses = yield from self.destinations(request.address, until)
        log.debug('%s: dialling %s', self.client.address, ' '.join(map(str, addresses)))
        target = yield from dial(addresses, until, self.settings.source)
        try:
            yield from self.answer(Reply.SUCCEEDED, Address.of(target.getsockname()))
            return Tunnel(self.client, self.request, target, self.stream.surplus)
        except BaseException:
            target.close()
            raise

    def do_BIND(self, request):
        """Accept one connection, of the peer that the client named, on its behalf.

        Others are turned away; if one of them was all that came, the second reply says so.
        """
        until = self.stream.until = after(self.settings.bind_timeout)
        expected = {host for host, _ in (yield from self.destinations(request.address, until))}
        host, told = self.own_address()
        with bound(Address(host, 0)) as listener:
            listener.listen(16)
            yield from self.answer(Reply.SUCCEEDED, Address(told, listener.getsockname()[1]))
            peer, address = yield from self.accept(listener, expected, until)
        try:
            yield from self.answer(Reply.SUCCEEDED, address)
            return Tunnel(self.client, self.request, peer, self.stream.surplus)
        except BaseException:
            peer.close()
            raise

    def accept(self, listener, expected, until):
        """The socket and the address of the expected peer, any if zeros are expected."""
        stranger = None
        while True:
            try:
                yield from self.stream.wait_for([listener], until)
            except socket.timeout:
                if stranger:
                    raise Refused(f'only {stranger} came', address=stranger) from None
                raise
            try:
                peer, address = listener.accept()
            except (*BLOCKED, ConnectionError):     # he has left already
                continue
            address = Address.of(address)
            if expected & {address.host, '0.0.0.0', '::'}:
                peer.setblocking(False)
                return peer, address
            stranger = address
            peer.close()

    def do_UDP_ASSOCIATE(self, request):
        """Relay datagrams; DST may be where the client will send from, or anything."""
        host, told = self.own_address()
        near = bound_in(host, self.settings.udp_ports)
        try:
            yield from self.answer(Reply.SUCCEEDED, Address(told, near.getsockname()[1]))
            return UdpRelay(self.client, self.request, near, self.hint(request.address))
        except BaseException:
            near.close()
            raise

    def hint(self, address):
        """Where the client will send from, of what it says.

        Some programs put their target there, and some do not know their address (PySocks: "0").
        """
        plausible = ('', '0', '0.0.0.0', '::', self.client.address.host)
        return address if address.port and address.host in plausible else UNSPECIFIED

    def do_RESOLVE(self, request):
        """Tor's command for a look-up; an IPv4 address is what its users expect."""
        until = self.stream.until = after(self.settings.connect_timeout)
        addresses = yield from resolve(canonical(request.address), until)
        address = min(addresses, key=lambda address: ':' in address.host)
        if ':' in address.host and isinstance(request, Request4):
            raise ProtocolError(f'{address.host}: SOCKS4 has no IPv6 addresses')
        yield from self.tell(Address(address.host, 0))

    def do_RESOLVE_PTR(self, request):
        """Tor's command for the name of an IP address."""
        host = plain_ip(request.address.host)
        if host is None:
            raise ProtocolError('RESOLVE_PTR of a name, expected an IP address',
                                reply=Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        until = self.stream.until = after(self.settings.connect_timeout)
        name, _ = yield Call(functools.partial(
            socket.getnameinfo, (host, 0), socket.NI_NAMEREQD), until)
        yield from self.tell(canonical(Address(name, 0)))

    def tell(self, address):
        """Answer with an address, which is all that was asked for."""
        self.outcome = f'done, {address.host}'
        yield from self.answer(Reply.SUCCEEDED, address)
        yield from self.stream.linger(after(LINGER))

    def own_address(self):
        """Our IP address for others to connect or send to, and how to tell it to the client.

        The one that the client reached us at, or the one to advertise; that may be another host's
        which forwards to us, so it is not always one to listen on.
        """
        host = self.request.getsockname()[0]
        for told in self.settings.advertise:
            if family_of(told) == family_of(host) and not is_loopback(host):
                return (told if is_ours(told) else host), told
        return host, host

    def destinations(self, address, until):
        """The IP addresses behind `address` that this client may reach; at least one."""
        allowed, refusal = [], None
        for candidate in (yield from resolve(canonical(address), until)):
            try:
                self.server.authorize(self.client, candidate)
            except Refused as error:
                refusal = error
            else:
                allowed.append(candidate)
        if not allowed:
            raise refusal
        return allowed


def prepared(settings):
    """The settings with users as bytes; OSError if `source` is not ours."""
    for host in settings.source:
        if not is_ours(host):
            raise OSError(errno.EADDRNOTAVAIL, f'cannot connect from {host}: it is not ours')
    users = {name_or_password(name): name_or_password(password)
             for name, password in settings.users.items()}
    return settings._replace(users=MappingProxyType(users))


def name_or_password(value):
    return value.encode() if isinstance(value, str) else value


def clients_possible():
    """How many clients, each with a target, the limit of open files allows; 0: any number."""
    if not resource:                    # Windows, whose select() takes 512 sockets
        return (512 - DESCRIPTORS_KEPT) // 2
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 0 if soft == resource.RLIM_INFINITY else max(4, (soft - DESCRIPTORS_KEPT) // 2)


class Helpers:
    """Threads, each with a loop, for tunnels that carry much.

    Large reads and writes run in parallel even in Python, and light tunnels need not wait for them.
    """

    def __init__(self, size):
        self._size = size
        self._threads = {}              # by loop

    @property
    def loops(self):
        return list(self._threads)

    def take(self, tunnel):
        """Move `tunnel` to a loop of its own, or to the one that has least."""
        if len(self._threads) < self._size and all(loop.items for loop in self.loops):
            with contextlib.suppress(OSError, RuntimeError):        # no descriptor, no thread
                self._start()
        if self._threads and tunnel.client and tunnel.loop not in self._threads:
            log.debug('%s: carries much', tunnel.client.address)
            tunnel.move(min(self.loops, key=lambda loop: len(loop.items)))

    def _start(self):
        loop = Loop()
        thread = threading.Thread(target=loop.run, name='socks-heavy', daemon=True)
        try:
            thread.start()
        except RuntimeError:
            loop.close()
            raise
        self._threads[loop] = thread

    def stop(self):
        for loop, thread in self._threads.items():
            loop.stop()
            thread.join()


class Server(socketserver.ThreadingTCPServer):
    """A SOCKS server on one or several addresses.

    server_address   (host, port), or a list of them; a name stands for all its addresses, port 0
                     for a free port, the same on all of them
    settings         a `Settings`
    handler_class    a `Handler`

    To run it: serve_forever(), which returns after shutdown() from another thread or from a signal
    handler; or start(), which runs it in the background until it is closed::

        with Server(('127.0.0.1', 0)).start() as server:
            print(server.server_address)

    To decide more: override verify_request() for who may connect, authorize() for where they may
    go, or a do_COMMAND method of the handler.

    Raises OSError for an address that cannot be listened on, and ValueError for an address beyond
    loopback if neither `users` nor `open` are set: it would serve everybody.
    """
    client = None                       # as an item of its loop
    request_queue_size = 1024
    heavy_loops = min(4, os.cpu_count() or 1)       # threads for what carries much

    def __init__(self, server_address=('127.0.0.1', 1080), settings=None, handler_class=Handler,
                 bind_and_activate=True):
        addresses = [server_address] if isinstance(server_address[0], str) else server_address
        socketserver.BaseServer.__init__(self, addresses, handler_class)
        self.settings = prepared(settings or Settings())
        self.max_clients = self.settings.max_clients or clients_possible()
        self.listeners = []             # sockets
        self.addresses = []             # theirs, as `Address`
        self.due = None                 # for `Timers`: the end of a pause
        self._accepting = False
        self._starving = False
        self._thread = None             # that of start()
        self._serving = threading.RLock()
        self._crew = Crew()
        self._helpers = Helpers(self.heavy_loops)
        self.loop = Loop(self._crew, self._helpers.take)
        if bind_and_activate:
            try:
                self.server_bind()
                self.server_activate()
            except BaseException:
                self.server_close()
                raise

    def server_bind(self):
        free_port = 0
        for host, port in self.server_address:
            self._bind(host, port or free_port)
            if not port:
                free_port = self.addresses[-1].port
        self._refuse_open_proxy()
        self.socket = self.listeners[0]
        self.server_address = self.addresses[0]

    def _bind(self, host, port):
        """Bind to all addresses of `host` that are here; one must be."""
        missing, before = None, len(self.listeners)
        for ip, _ in self._resolve(host):
            try:
                sock = bound(Address(ip, port))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
                continue
            self.listeners.append(sock)
            self.addresses.append(Address.of(sock.getsockname()))
            port = self.addresses[-1].port      # a free one serves all of them
        if missing and len(self.listeners) == before:
            raise missing

    @staticmethod
    def _resolve(host):
        try:
            return run(resolve(Address(host, 0)))
        except OSError as error:
            raise OSError(error.errno, f'cannot listen on {host}: {reason(error)}') from None

    def _refuse_open_proxy(self):
        if not (self.settings.users or self.settings.open):
            for address in self.addresses:
                if not is_loopback(address.host):
                    raise ValueError(f'listening on {address} without users would serve everybody; '
                                     f'give users (SOCKS_USERS, -u) or allow that (--open)')

    def server_activate(self):
        for sock, address in zip(self.listeners, self.addresses):
            try:
                sock.listen(self.request_queue_size)
            except OSError as error:
                raise OSError(error.errno, f'cannot listen on {address}: {reason(error)}') from None

    def start(self):
        """Serve in a thread of its own; gives the server itself, for a `with`."""
        if self.loop.closed or self._thread:
            raise RuntimeError('the server is closed, or started already')
        self._thread = threading.Thread(
            target=self.serve_forever, name='socks-server', daemon=True)
        self._thread.start()
        return self

    def serve_forever(self, poll_interval=None):
        """Serve until shutdown(); may be called again."""
        with self._serving:
            self._watch_listeners(True)
            self.loop.run()
            self._watch_listeners(False)

    def shutdown(self):
        """Have serve_forever() return, at once if it has not begun; wait for that unless it is
        this thread's."""
        self.loop.stop()
        with self._serving:
            thread, self._thread = self._thread, None
        if thread and thread is not threading.current_thread():
            thread.join()

    def server_close(self):
        """Stop serving, close every connection, end every thread."""
        self.shutdown()
        for sock in self.listeners:
            sock.close()
        self._crew.dismiss()
        self._helpers.stop()
        for loop in self.loops():
            loop.close()

    # Accepting.  The server is what its loop watches the listeners for, so that one thread does
    # all that is quick, and no connection has to wait for another thread to wake up.

    def _watch_listeners(self, accepting):
        if accepting != self._accepting:
            self._accepting = accepting
            for sock in self.listeners:
                self.loop.watch(sock, READ * (not accepting), READ * accepting, self)

    def ready(self, listener, _):
        for _ in range(ACCEPT_BATCH):
            if self._full():
                return self._pause()
            try:
                request, client_address = listener.accept()
            except BLOCKED:
                return
            except OSError as error:
                if error.errno in NO_ROOM:
                    self._starve(error)
                    return self._pause()
                continue                # that client has left already
            self._starving = False
            self._receive(request, client_address)

    def _receive(self, request, client_address):
        try:
            if self.verify_request(request, client_address):
                self.process_request(request, client_address)
            else:
                self.shutdown_request(request)
        except Exception:
            self.handle_error(request, client_address)
            self.shutdown_request(request)

    def _starve(self, error):
        if not self._starving:          # one line is enough until it is over
            log.warning('cannot accept clients: %s', reason(error))
        self._starving = True

    def _full(self):
        return self.max_clients and sum(
            len(loop.items) for loop in self.loops()) >= self.max_clients

    def _pause(self):
        """Leave clients in the listen queue until another one ends, or for ACCEPT_PAUSE."""
        self._watch_listeners(False)
        self.loop.timers.set(self, self.loop.now + ACCEPT_PAUSE)

    def expire(self):
        """Accept again."""
        self.loop.timers.set(self, None)
        self._watch_listeners(True)

    def client_ended(self):
        if not self._accepting:
            self.loop.call(self, self.expire)

    def close(self, outcome):
        """As an item of its loop; the listeners are closed by server_close()."""

    # One client

    def process_request(self, request, client_address):
        """Begin the conversation with a client; the loop goes on with it."""
        request.setblocking(False)
        client = Client(self, Address.of(client_address))
        handler = self.RequestHandlerClass(request, client, self)
        task = Task(client, request, handler.converse())
        self.loop.attempt(task, task.start, self.loop)

    def handle_error(self, request, client_address):
        log.exception('%s: this is a bug', client_address)

    def authorize(self, client, target):
        """Raise Refused unless `client`, a `Client`, may reach `target`, the `Address` of an IP."""
        authorize(client.address, client.command, target, self.addresses)

    @property
    def clients(self):
        """All that are served now, as a list of `Client`."""
        clients = (item.client for loop in self.loops() for item in list(loop.items))
        return [client for client in clients if client]     # it may be ending

    def loops(self):
        """All that carry clients."""
        return [self.loop, *self._helpers.loops]


# ----------------------------------------------------------------------------------- command line

EPILOG = """\
examples:
  socks.py                              serve this machine's programs on 127.0.0.1:1080
  socks.py -p 0                         take a free port and print it
  SOCKS_USERS=bob:secret socks.py -b 0.0.0.0
                                        serve bob, from everywhere
  curl -x socks5h://127.0.0.1:1080 http://example.org/

environment:
  SOCKS_USERS                           NAME:PASSWORD pairs, separated by white space

signals:
  INT, TERM                             stop

exit status:
  0 stopped by a signal, 1 cannot start, 2 wrong usage
"""


def port_number(text):
    """argparse type: a port, 0 to 65535."""
    if not (re.match('[0-9]{1,5}$', text) and int(text) < 65536):
        raise argparse.ArgumentTypeError(f'{text!r}: expected a port, 0 to 65535')
    return int(text)


def port_range(text):
    """argparse type: (lowest, highest) of LOW-HIGH, or of one port."""
    low, _, high = text.partition('-')
    low, high = port_number(low), port_number(high or low)
    if not 0 < low <= high:
        raise argparse.ArgumentTypeError(f'{text!r}: expected LOW-HIGH, from 1 to 65535')
    return low, high


def host_and_port(text):
    """argparse type: (host, port or None) of HOST, HOST:PORT, IPV6 or [IPV6]:PORT."""
    if ip_bytes(text) is not None:
        return text, None
    host, colon, port = text.rpartition(':')
    if not colon or text.endswith(']'):
        host, port = text, None
    if host.startswith('[') and host.endswith(']') and ':' in host:
        host = host[1:-1]
    elif not host or set(host) & set('[]:'):
        raise argparse.ArgumentTypeError(
            f'{text!r}: expected ADDRESS, ADDRESS:PORT, IPV6 or [IPV6]:PORT')
    return host, port if port is None else port_number(port)


def name_and_password(text):
    """argparse type: both bytes, of NAME:PASSWORD."""
    name, colon, password = os.fsencode(text).partition(b':')
    if not (colon and 0 < len(name) < 256 and len(password) < 256):
        raise argparse.ArgumentTypeError(
            'expected NAME:PASSWORD, NAME of 1 to 255 bytes, PASSWORD of at most 255')
    return name, password


def ip_address(text):
    """argparse type: the text of an IP address."""
    if ip_bytes(text) is None:
        raise argparse.ArgumentTypeError(f'{text!r}: expected an IP address')
    return text


def seconds(text):
    """argparse type: a time, 0 or more."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float('inf'):
            return float(text)
    raise argparse.ArgumentTypeError(f'{text!r}: expected seconds, 0 or more')


def count(text):
    """argparse type: a whole number, 0 or more."""
    if not re.match('[0-9]+$', text):
        raise argparse.ArgumentTypeError(f'{text!r}: expected a whole number, 0 or more')
    return int(text)


DEFAULTS = Settings()

# Group, then its options: flags and what add_argument() takes.
OPTIONS = [
    ('listening', [
        (('-b', '--bind'), dict(
            metavar='ADDRESS[:PORT]', type=host_and_port, action='append', default=[],
            help='address or name to listen on, repeatable (default: 127.0.0.1)')),
        (('-p', '--port'), dict(
            metavar='PORT', type=port_number, default=1080,
            help='port where --bind has none, 0 for a free one (default: %(default)s)'))]),
    ('who may use it', [
        (('-u', '--user'), dict(
            metavar='NAME:PASSWORD', type=name_and_password, action='append', default=[],
            dest='users', help='ask for a password, repeatable; others on this machine can see it, '
                               'see SOCKS_USERS below (default: ask nobody)')),
        (('--open',), dict(
            action='store_true',
            help='serve everybody: allow an address beyond loopback without users')),
        (('--max-clients',), dict(
            metavar='N', type=count, default=DEFAULTS.max_clients,
            help='serve so many at once, further ones wait '
                 '(default: as many as open files allow)'))]),
    ('what they may do', [
        (('--tor-extensions',), dict(
            action='store_true', help="offer Tor's look-up commands, RESOLVE and RESOLVE_PTR")),
        (('--udp-strict',), dict(
            action='store_true', help='pass on datagrams only from where the client has sent some '
                                      '(default: from anywhere)'))]),
    ('addresses', [
        (('--source',), dict(
            metavar='ADDRESS', type=ip_address, action='append', default=[],
            help='connect from this address, repeatable: one IPv4, one IPv6 '
                 '(default: as the system routes)')),
        (('--advertise',), dict(
            metavar='ADDRESS', type=ip_address, action='append', default=[],
            help='tell this address to clients of BIND and UDP ASSOCIATE, repeatable: one IPv4, '
                 'one IPv6 (default: where the client reached us)')),
        (('--udp-ports',), dict(
            metavar='LOW-HIGH', type=port_range, default=DEFAULTS.udp_ports,
            help='ports that clients send datagrams to (default: any)'))]),
    ('timeouts, in seconds, 0 for none', [
        ((f'--{name}-timeout',), dict(
            metavar='SECONDS', type=seconds, default=getattr(DEFAULTS, f'{name}_timeout'),
            help=f'{what} (default: %(default)g)'))
        for name, what in (
            ('handshake', 'from accept to the whole request'),
            ('connect', 'for connecting to the target'),
            ('bind', 'for the peer that a BIND waits for'),
            ('idle', 'for a connection through which nothing moves'),
            ('udp', 'for an association without datagrams'))]),
    ('logging', [
        (('-v', '--verbose'), dict(action='store_true', help='log every step')),
        (('-q', '--quiet'), dict(action='store_true', help='log warnings only')),
        (('-V', '--version'), dict(action='version', version=f'socks.py {__version__}'))]),
]


def build_parser():
    """The command line; every default of a setting is the one in `Settings`."""
    parser = argparse.ArgumentParser(
        prog='socks.py', description='A SOCKS4, SOCKS4a and SOCKS5 proxy.', epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, options in OPTIONS:
        group = parser.add_argument_group(title)
        for flags, details in options:
            group.add_argument(*flags, **details)
    return parser


def settings_from(args, environ):
    """The `Settings` of parsed arguments and the environment; ValueError if they contradict."""
    try:
        pairs = args.users + [name_and_password(text)
                              for text in environ.get('SOCKS_USERS', '').split()]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f'SOCKS_USERS: {error}, pairs separated by white space') from None
    users = dict(pairs)
    if len(users) < len(pairs):
        raise ValueError('-u, SOCKS_USERS: a user is given twice')
    for name in ('source', 'advertise'):
        hosts = getattr(args, name)
        if len(set(map(family_of, hosts))) < len(hosts):
            raise ValueError(f'--{name}: expected one address of a family')
    fields = {name: tuple(value) if isinstance(value, list) else value
              for name, value in vars(args).items() if name in Settings._fields}
    return Settings(**dict(fields, users=MappingProxyType(users)))


def raise_descriptor_limit(wanted=65536):
    """Allow this process as many open files as it may have, up to `wanted`."""
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):      # macOS may allow less than `hard`
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def set_up_logging(args):
    level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=level, format='%(asctime)s %(levelname)s %(message)s')
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args)
    raise_descriptor_limit()
    addresses = [(host, args.port if port is None else port)
                 for host, port in args.bind or [('127.0.0.1', None)]]
    try:
        server = Server(addresses, settings_from(args, os.environ))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        print(f'socks.py: {reason(error)}', file=sys.stderr)
        return 1
    if args.users:
        log.warning('-u shows passwords to all users of this machine, SOCKS_USERS does not')
    with server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.shutdown())
        # A signal that comes just before select() would be seen only after it.
        signal.set_wakeup_fd(server.loop.waker.wakeup_fd())
        for address in server.addresses:
            if 0 in (port for _, port in addresses):
                print(f'listening on {address}', flush=True)
            log.info('listening on %s', address)
        server.serve_forever()
        signal.set_wakeup_fd(-1)
        log.info('stopped')
    return 0


if __name__ == '__main__':
    sys.exit(main())
