#!/usr/bin/env python3
"""socks.py: a SOCKS and HTTP proxy, and a client in PySocks' place, on the standard library alone.

Run one::

    python socks.py -p 1080

Embed one, for example in a test suite (port 0 takes a free port)::

    with socks.Server(('127.0.0.1', 0)).start() as server:
        print(f'socks5h://{server.server_address}')

Connect through one (PySocks' names work too, see "socket face")::

    socks.create_connection(('example.org', 80), proxy='socks5h://127.0.0.1:1080')

All that takes time is written as a conversation, a generator in straight lines that yields what it
waits for.  One `Loop`, a thread with a selector, goes on with whichever can go on: it accepts,
negotiates, dials and answers, and then moves the bytes of the `Tunnel`.  Other threads do only what
is better done elsewhere: name look-ups, which block, and tunnels that turn out to carry much.

The client's conversations are the same in shape; run() goes through one in the thread that calls.

Specifications: SOCKS4 and SOCKS4a (Ying-Da Lee), RFC 1928 (SOCKS5), RFC 1929 (user name and
password), RFC 1961 (GSSAPI), RFC 8305 (connecting to a name with several addresses), RFC 9110
and RFC 9112 (HTTP), RFC 7617 (its passwords), RFC 1413 (ident), the PROXY protocol, Tor's
socks-extensions.

Sections, each of which uses only those before it: words, errors, wire format, sockets, access,
loops, relays, client, server, socket face, operation, command line.
"""

import argparse
import atexit
import codecs
import contextlib
import enum
import errno
import functools
import io
import ipaddress
import itertools
import logging
import mmap
import os
import re
import select
import selectors
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
from binascii import a2b_base64, b2a_base64
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
try:
    from contextvars import ContextVar
except ImportError:                     # Python 3.6
    ContextVar = None

__version__ = '2.0.0'

log = logging.getLogger('socks')

# As they were at import: programs replace them by ours, which must not come back to themselves.
_orgsocket = _orig_socket = socket.socket
_orig_getaddrinfo = socket.getaddrinfo


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
    FORWARD = 0x100                     # any HTTP method but CONNECT; not a code of SOCKS


class HttpMethod(int):
    """The method of a forwarded request: equal to CONNECT for rules, with its own name for logs."""

    def __new__(cls, name):
        method = int.__new__(cls, Command.CONNECT)
        method.name = name
        return method


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


class HttpCode(Outcome):
    """What became of an HTTP request (RFC 9110 section 15)."""
    OK = 200, 'Connection established'
    BAD_REQUEST = 400, 'Bad Request'
    FORBIDDEN = 403, 'Forbidden'
    LOGIN_REQUIRED = 407, 'Proxy Authentication Required'
    HEAD_TOO_LARGE = 431, 'Request Header Fields Too Large'
    NOT_IMPLEMENTED = 501, 'Not Implemented'
    BAD_GATEWAY = 502, 'Bad Gateway'
    GATEWAY_TIMEOUT = 504, 'Gateway Timeout'
    VERSION_NOT_SUPPORTED = 505, 'HTTP Version Not Supported'


# What a `Reply` is in HTTP; any other is BAD_GATEWAY.
HTTP_CODES = {
    Reply.SUCCEEDED: HttpCode.OK,
    Reply.NOT_ALLOWED: HttpCode.FORBIDDEN,
    Reply.TTL_EXPIRED: HttpCode.GATEWAY_TIMEOUT,
    Reply.COMMAND_NOT_SUPPORTED: HttpCode.NOT_IMPLEMENTED,
}


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

    def __reduce__(self):
        kind, args, state = super().__reduce__()
        return kind, args, dict(state, errno=self.errno)


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


Socks5AuthError, Socks5Error, Socks4Error = SOCKS5AuthError, SOCKS5Error, SOCKS4Error
_ProxyError = ProxyError                # names before PySocks 1.5, which old programs use


class FileError(ValueError):
    """A file of ours has something wrong in it, or is not there; the text says which and what."""


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

# The other way round, for connect_ex() and the errno of a `ProxyError`; any other is ECONNABORTED.
REPLY_ERRNOS = {
    Reply.NOT_ALLOWED: errno.EACCES,
    Reply.NETWORK_UNREACHABLE: errno.ENETUNREACH,
    Reply.HOST_UNREACHABLE: errno.EHOSTUNREACH,
    Reply.CONNECTION_REFUSED: errno.ECONNREFUSED,
    Reply.TTL_EXPIRED: errno.ETIMEDOUT,
    Reply.COMMAND_NOT_SUPPORTED: errno.EOPNOTSUPP,
    Reply.ADDRESS_TYPE_NOT_SUPPORTED: errno.EAFNOSUPPORT,
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
MAX_LINE, MAX_LINES = 8192, 100         # of the head of an HTTP answer
MAX_HEAD, MAX_FIELDS = 1 << 16, 200     # bytes and fields of a head that is forwarded


def reader(data):
    """A `read` function for unpack over the bytes of `data`, and one for all that is left."""
    stream = io.BytesIO(data)

    def read(n):
        taken = stream.read(n)
        if len(taken) < n:
            raise EOFError(f'{n} bytes expected, {len(taken)} left')
        return taken
    return read, stream.read


def expect_version(name, got, wanted):
    """Raise ProtocolError unless the version byte is the one `wanted`."""
    if got != wanted:
        raise ProtocolError(f'{name} version {got:#04x}, expected {wanted:#04x}')


def family_of(host):
    """The address family of an IP address given as text."""
    return socket.AF_INET6 if ':' in host else socket.AF_INET


@functools.lru_cache(256)
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


def encoded(value):
    """The bytes of a user name or password that is given as bytes or text."""
    return value.encode() if isinstance(value, str) else value


def is_utf8(data):
    with contextlib.suppress(UnicodeDecodeError):
        data.decode()
        return True
    return False


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
        return cls(cls.unpack_reply(read), Address.unpack(read))

    @staticmethod
    def unpack_reply(read):
        """Only the code: some servers end a failure there, or put an odd address behind it."""
        version, reply, _ = read(3)
        expect_version('SOCKS', version, 5)
        return reply


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
        if not isinstance(reply, Reply4):
            reply = Reply4.GRANTED if reply == Reply.SUCCEEDED else Reply4.REJECTED
        return cls(reply, address)

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


class GssMessage(NamedTuple):
    """A message of GSSAPI's negotiation, or of what it protects then (RFC 1961 sections 3 to 5)."""
    kind: int
    token: bytes = b''

    TOKEN, LEVEL, DATA, ABORT = 1, 2, 3, 0xFF
    LARGEST = 0xFFFF                    # bytes of a token

    def pack(self):
        if self.kind == self.ABORT:
            return bytes((1, self.kind))
        return struct.pack('!BBH', 1, self.kind, len(self.token)) + self.token

    @classmethod
    def unpack(cls, read):
        version, kind = read(2)
        expect_version('GSSAPI', version, 1)
        if kind == cls.ABORT:
            return cls(kind)
        return cls(kind, read(int.from_bytes(read(2), 'big')))

    @classmethod
    def unpack_token(cls, kind, read):
        """Only the token, of a message that must be of this kind."""
        message = cls.unpack(read)
        if message.kind != kind:
            raise ProtocolError(f'GSSAPI message {message.kind:#04x}, expected {kind:#04x}')
        return message.token


class HttpConnect(NamedTuple):
    """A request for a tunnel to an HTTP proxy (RFC 9110 section 9.3.6)."""
    address: Address
    credentials: bytes = b''            # NAME:PASSWORD (RFC 7617), if any

    def pack(self):
        host = (self.address.host if ip_bytes(self.address.host)
                else name_bytes(self.address.host).decode())
        where = str(Address(host, self.address.port)).encode()
        lines = [b'CONNECT %b HTTP/1.1' % where, b'Host: ' + where]
        if self.credentials:
            lines.append(b'Proxy-Authorization: Basic '
                         + b2a_base64(self.credentials, newline=False))
        return b'\r\n'.join(lines) + b'\r\n\r\n'


class HttpStatus(NamedTuple):
    """The first line of the answer to it."""
    code: int
    phrase: str

    @classmethod
    def unpack(cls, read):
        line = http_line(read)
        match = re.match(r'HTTP/[0-9]\.[0-9] ([0-9]{3})(?: (.*))?$', line.decode('latin-1'))
        if not match:
            raise ProtocolError(f'{line[:40]!r}, expected the status line of an HTTP proxy')
        return cls(int(match.group(1)), match.group(2) or '')


class HttpHead(NamedTuple):
    """The first line and the fields of an HTTP message (RFC 9112 sections 2 to 5).

    They are text in Latin-1, which has a character for each byte.
    """
    start: str
    fields: Tuple[Tuple[str, str], ...] = ()

    END = re.compile(rb'\n\r?\n')
    FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\0-\x08\n-\x1f\x7f]*)")
    ANY_FIELD = re.compile(r'([^\s:]+)[ \t]*:([^\n]*)')
    STATUS = re.compile(r'HTTP/1[.][0-9] [1-9][0-9][0-9]( [^\r]*)?')
    LONGEST = 1024                      # characters of a list whose members matter
    # Fields for the next hop only (RFC 9110 section 7.6.1); those that Connection cannot add.
    HOP_BY_HOP = {'connection', 'keep-alive', 'proxy-authenticate', 'proxy-authentication-info',
                  'proxy-authorization', 'proxy-connection', 'te', 'upgrade'}
    FRAMING = {'host', 'content-length', 'transfer-encoding'}

    def pack(self):
        lines = [self.start, *map('%s: %s'.__mod__, self.fields)]
        return '\r\n'.join([*lines, '\r\n']).encode('latin-1')

    @classmethod
    def unpack(cls, data):
        """From the bytes of a whole head; ProtocolError if another parser might read it differently
        (RFC 9112 sections 2.2 and 5)."""
        start, *lines = data.decode('latin-1')[:-4].split('\r\n')
        if len(lines) > MAX_FIELDS:
            raise ProtocolError(f'{len(lines)} HTTP fields, expected at most {MAX_FIELDS}',
                                reply=HttpCode.HEAD_TOO_LARGE)
        matches = [cls.FIELD.fullmatch(line) for line in lines]
        if None in matches or not data.endswith(b'\r\n\r\n'):     # not shown, it may be secret
            place = f'field {matches.index(None) + 1}' if None in matches else 'head'
            raise ProtocolError(f'HTTP {place} is malformed', reply=HttpCode.BAD_REQUEST)
        return cls(start, tuple((name, value.strip(' \t'))
                                for name, value in (match.groups() for match in matches)))

    @classmethod
    def unpack_answer(cls, data):
        """The head of a target's answer; ProtocolError if it is not HTTP.  Many servers are old or
        careless, so a malformed field is only left out."""
        text = re.sub('\r?\n[ \t]+', ' ', data.decode('latin-1')).replace('\0', ' ')
        start, *lines = re.split('\r?\n', text.rstrip('\r\n'))
        if not cls.STATUS.fullmatch(start):
            raise ProtocolError(f'{start[:40]!r}, expected the status line of an HTTP server')
        if len(lines) > MAX_FIELDS:
            raise ProtocolError(f'{len(lines)} HTTP fields, expected at most {MAX_FIELDS}')
        matches = (cls.ANY_FIELD.fullmatch(line.replace('\r', ' ')) for line in lines)
        return cls(start, tuple((name, value.strip(' \t'))
                                for name, value in (match.groups() for match in matches if match)))

    def values(self, name):
        """The values of all fields with this name, which is in lower case."""
        return [value for field, value in self.fields if field.lower() == name]

    def words(self, name):
        """The members of the lists in these fields, in lower case."""
        text = ','.join(self.values(name)).lower()
        if len(text) > self.LONGEST:
            raise ProtocolError(f'HTTP {name} of more than {self.LONGEST} characters',
                                reply=HttpCode.HEAD_TOO_LARGE)
        words = (word.strip(' \t') for word in text.split(','))    # strip() alone takes more
        return [word for word in words if word]

    def end_to_end(self, *without):
        """The fields to pass on, except those with one of these names."""
        dropped = self.HOP_BY_HOP | (set(self.words('connection')) - self.FRAMING) | set(without)
        return tuple(field for field in self.fields if field[0].lower() not in dropped)


class HttpRequest(NamedTuple):
    """A request to an HTTP proxy (RFC 9112 section 3): CONNECT, or one to forward."""
    method: str
    address: Address
    path: str                           # at the target
    minor: str                          # of the version, HTTP/1.0 or 1.1
    length: Optional[int]               # bytes of the body; None: it is chunked
    head: HttpHead

    LINE = re.compile(r'([^ ]+) ([^\0-\x20\x7f]+) HTTP/([0-9])[.]([0-9])')
    METHOD = re.compile(r'[A-Z][A-Z0-9_-]{0,31}')
    URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)')
    HOST_AND_PORT = re.compile(r'(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@\\]+))(?::([0-9]{0,5}))?')

    def __repr__(self):
        return f'HTTP {self.method} {self.address!r}'       # the rest may be secret

    @property
    def command(self):
        return Command.CONNECT if self.method == 'CONNECT' else Command.FORWARD

    @classmethod
    def unpack(cls, data):
        """From the bytes of a whole head; the `reply` of a ProtocolError is an `HttpCode`."""
        head = HttpHead.unpack(data)
        match = cls.LINE.fullmatch(head.start)
        if not match:
            raise cls._wrong('HTTP request line, expected METHOD TARGET HTTP/1.1')
        method, target, major, minor = match.groups()
        if major != '1':
            raise cls._wrong(f'HTTP/{major}.{minor}, expected 1.1', HttpCode.VERSION_NOT_SUPPORTED)
        if not cls.METHOD.fullmatch(method):
            raise cls._wrong(f'HTTP method {method[:40]!r}', HttpCode.NOT_IMPLEMENTED)
        if len(head.values('host')) > 1:
            raise cls._wrong('HTTP with more than one Host')
        length = cls._length(head, minor)
        if method == 'CONNECT':
            if length != 0:
                raise cls._wrong('HTTP CONNECT with a body')
            return cls(method, cls._address(target, ''), '', minor, 0, head)
        if method in ('OPTIONS', 'TRACE') and not all(
                value.strip('0') for value in head.values('max-forwards')):
            raise cls._wrong(f'HTTP {method} for this proxy itself', HttpCode.NOT_IMPLEMENTED)
        url = cls.URL.match(target)
        if not url:
            raise cls._wrong('HTTP to this port itself, expected CONNECT, or a whole URL')
        scheme, authority, path = url.groups()
        if scheme.lower() != 'http':
            raise cls._wrong(f'HTTP for {scheme[:40]}:, expected http:, or CONNECT',
                             HttpCode.NOT_IMPLEMENTED)
        address = cls._address(authority.rpartition('@')[2], '80')
        if method == 'OPTIONS' and not path:
            path = '*'
        elif not path.startswith('/'):
            path = '/' + path
        return cls(method, address, path, minor, length, head)

    @staticmethod
    def _wrong(text, code=HttpCode.BAD_REQUEST):
        return ProtocolError(text, reply=code)

    @classmethod
    def _length(cls, head, minor):
        """The length of the body; refused if it can be read in two ways (RFC 9112 section 6.3)."""
        lengths, codings = head.values('content-length'), head.words('transfer-encoding')
        if head.values('transfer-encoding'):
            if lengths or minor == '0' or codings[-1:] != ['chunked'] or 'chunked' in codings[:-1]:
                raise cls._wrong('HTTP Transfer-Encoding: expected chunked at its end, once, '
                                 'and no Content-Length')
            return None
        if len(lengths) > 1 or lengths and not re.fullmatch('[0-9]{1,18}', lengths[0]):
            raise cls._wrong('HTTP Content-Length: expected one number')
        return int(lengths[0]) if lengths else 0

    @classmethod
    def _address(cls, authority, usual_port):
        match, shown_as = cls.HOST_AND_PORT.fullmatch(authority), authority.rpartition('@')[2][:40]
        port = match and (match.group(3) or usual_port)
        if not port or not 0 < int(port) < 65536:
            raise cls._wrong(f'HTTP to {shown_as!r}, expected a host, and a port up to 65535')
        host = name_text((match.group(1) or match.group(2)).encode('latin-1'))
        try:
            if match.group(1) and len(ip_bytes(host) or b'') != 16 or len(host) > MAX_NAME:
                raise ValueError
            name_bytes(host)
        except ValueError:
            raise cls._wrong(f'HTTP to {shown_as!r}, expected a host name, or an IPv6 address in '
                             f'brackets') from None
        return Address(host, int(port))

    @property
    def credentials(self):
        """The `Credentials` for this proxy (RFC 7617), or None."""
        given = self.head.values('proxy-authorization')
        match = len(given) == 1 and re.fullmatch('(?i)basic +([a-z0-9+/]{1,700})=*', given[0])
        try:
            pair = a2b_base64(match.group(1) + '==') if match else b''
        except ValueError:
            pair = b''
        name, colon, password = pair.partition(b':')
        return Credentials(name, password) if colon else None

    @property
    def upgrade(self):
        """The protocols that the client offers to switch to (RFC 9110 section 7.8), '' for none.
        HTTP/2 is left out, since it could carry requests for other hosts."""
        wanted = self.head.words('upgrade') if 'upgrade' in self.head.words('connection') else []
        is_possible = self.minor != '0' and wanted and 'h2c' not in wanted
        return ', '.join(self.head.values('upgrade')) if is_possible else ''

    def forwarded(self):
        """The head to send to the target: Host is the URL's (RFC 9112 section 3.2.2), and no other
        request will follow."""
        host, port = name_bytes(self.address.host).decode(), self.address.port
        where = str(Address(host, port))
        fields = [('Host', where[:-3] if port == 80 else where)]
        for name, value in self.head.end_to_end('host'):
            if name.lower() == 'max-forwards' and re.fullmatch('[0-9]{1,9}', value):
                value = str(max(0, int(value) - 1))
            fields.append((name, value))
        fields.append(('Via', f'1.{self.minor} socks.py'))
        fields.append(('Connection', 'Upgrade' if self.upgrade else 'close'))
        if self.upgrade:
            fields.append(('Upgrade', self.upgrade))
        return HttpHead(f'{self.method} {self.path} HTTP/1.{self.minor}', tuple(fields))


class HttpBody:
    """Finds the end of a request's body in the bytes that arrive (RFC 9112 sections 6 and 7).

    length   bytes of the body; None: it is chunked
    """
    LONGEST = 4096                      # bytes of a line
    # The line end that closes one chunk is matched with the size of the next.
    CHUNK = re.compile(rb'\r\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0-\x08\n-\x1f\x7f]*)?\r\n')
    TRAILER = re.compile(b'(?:%b)?\r\n' % HttpHead.FIELD.pattern.encode())

    def __init__(self, length):
        self._left = length or 0        # bytes up to the next line, or to the end
        self._line = b'\r\n' if length is None else None        # incomplete; None: no more lines
        self._pattern = self.CHUNK

    def take(self, data):
        """How many bytes of `data` belong to the body; ProtocolError if it is malformed."""
        taken = 0
        while taken < len(data):
            step = min(self._left, len(data) - taken)
            self._left -= step
            taken += step
            if self._left or self._line is None:
                break
            taken += self._take_line(bytes(data[taken:taken + self.LONGEST]))
        return taken

    def _take_line(self, data):
        text, is_chunk = self._line + data, self._pattern is self.CHUNK
        match = self._pattern.match(text)
        if match:
            used = match.end() - len(self._line)
            self._line = b''
            if is_chunk:
                self._left = int(match.group(1), 16)
                if not self._left:
                    self._pattern = self.TRAILER
            elif match.group() == b'\r\n':
                self._line = None
            return used
        begun = text[2:] if is_chunk else text
        if (len(text) > self.LONGEST or b'\n' in begun or b'\r' in begun[:-1]
                or is_chunk and not b'\r\n'.startswith(text[:2])):
            raise ProtocolError('HTTP chunk or trailer is malformed', reply=HttpCode.BAD_REQUEST)
        self._line = text
        return len(data)


class HttpAnswer(NamedTuple):
    """An answer from the proxy itself; without a code nothing is sent, the target will answer."""
    code: Optional[HttpCode]
    text: str = ''
    has_body: bool = True               # False: the answer to HEAD

    def pack(self):
        if self.code is None:
            return b''
        start = f'HTTP/1.1 {self.code:d} {self.code.text}'
        if self.code == HttpCode.OK:
            return HttpHead(start).pack()
        body = f'{self.text}\n'.encode('utf-8', 'backslashreplace')
        fields = [('Content-Type', 'text/plain; charset=utf-8'),
                  ('Content-Length', str(len(body))), ('Connection', 'close')]
        if self.code == HttpCode.LOGIN_REQUIRED:
            fields.append(('Proxy-Authenticate', 'Basic realm="socks.py", charset="UTF-8"'))
        return HttpHead(start, tuple(fields)).pack() + body * self.has_body


def text_line(read, limit, name):
    """The next line, without its end."""
    line = bytearray()
    while not line.endswith(b'\n'):
        if len(line) >= limit:
            raise ProtocolError(f'{name} of more than {limit} bytes')
        line += read(1)
    return bytes(line).rstrip(b'\r\n')


def http_line(read):
    return text_line(read, MAX_LINE, 'an HTTP line')


class ProxyHeader(NamedTuple):
    """What a load balancer says first of the connection that it forwards (PROXY protocol 1 and 2).

    Both are None in its own connections, health checks for example.
    """
    source: Optional[Address] = None
    destination: Optional[Address] = None

    SIGNATURE = b'\r\n\r\n\0\r\nQUIT\n'
    FORMATS = {0x11: 4, 0x21: 16}       # TCP over IPv4 and IPv6: bytes of an address

    def pack(self):
        """In version 2."""
        if not self.source:
            return self.SIGNATURE + b'\x20\0\0\0'
        hosts = ip_bytes(self.source.host) + ip_bytes(self.destination.host)
        ports = struct.pack('!HH', self.source.port, self.destination.port)
        kind = 0x11 if len(hosts) == 8 else 0x21
        return self.SIGNATURE + struct.pack('!BBH', 0x21, kind, len(hosts) + 4) + hosts + ports

    @classmethod
    def unpack(cls, read):
        first = read(1)
        if first == b'P':
            return cls._unpack_text(b'P' + text_line(read, 106, 'a PROXY line'))
        if first != b'\r' or first + read(11) != cls.SIGNATURE:
            raise ProtocolError('no PROXY header, which is mandatory from here')
        version, kind, length = struct.unpack('!BBH', read(4))
        if version not in (0x20, 0x21):
            raise ProtocolError(f'PROXY version and command {version:#04x}, expected 0x20 or 0x21')
        data, size = read(length), cls.FORMATS.get(kind)
        if version == 0x20 or size is None:
            return cls()
        if length < 2 * size + 4:
            raise ProtocolError(f'PROXY addresses of {length} bytes, expected {2 * size + 4}')
        source, destination = struct.unpack('!HH', data[2 * size:2 * size + 4])
        return cls(Address(ip_text(data[:size]), source),
                   Address(ip_text(data[size:2 * size]), destination))

    @classmethod
    def _unpack_text(cls, line):
        words = line.decode('latin-1').split(' ')
        if words[:2] == ['PROXY', 'UNKNOWN']:
            return cls()
        size = {'TCP4': 4, 'TCP6': 16}.get(words[1] if len(words) == 6 else '')
        if (words[0] != 'PROXY' or any(len(ip_bytes(host) or b'') != size for host in words[2:4])
                or not all(re.match('[0-9]{1,5}$', port) and int(port) < 65536
                           for port in words[4:])):
            raise ProtocolError(f'PROXY line {line!r} is malformed')
        source, destination = zip(words[2:4], map(int, words[4:]))
        return cls(Address(*source), Address(*destination))


class IdentQuery(NamedTuple):
    """Who has the connection between these two ports? (RFC 1413)"""
    theirs: int                         # at the host that is asked
    ours: int

    def pack(self):
        return b'%d , %d\r\n' % self


class IdentReply(NamedTuple):
    """The user; None if the host does not tell."""
    userid: Optional[bytes]

    @classmethod
    def unpack(cls, read):
        fields = text_line(read, 1000, 'an ident reply').split(b':', 3)
        kind, system = (b':'.join(fields[1:2]).strip(), b':'.join(fields[2:3]).strip())
        known = len(fields) == 4 and kind == b'USERID' and system.partition(b',')[0] != b'OTHER'
        return cls(fields[3].strip(b' \t') if known else None)


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
RESET = struct.pack('ii', 1, 0)         # SO_LINGER, on, 0 seconds: close sends RST
V4_MAPPED = b'\0' * 10 + b'\xff\xff'
NEVER_RESOLVED = ('invalid', 'onion')   # RFC 6761 section 6.4, RFC 7686 section 2


@functools.lru_cache(256)
def plain_ip(host):
    """`host` in the usual spelling if it is an IP address, a v4-mapped one as IPv4; else None."""
    packed = ip_bytes(host)
    if packed is None:
        return None
    return ip_text(packed[12:] if packed[:12] == V4_MAPPED else packed)


def client_key(host):
    """What counts as one client in every limit: an IPv4 address, or the /64 network of an IPv6
    address, since whoever has one address of such a network has them all."""
    packed = ip_bytes(host)
    return host if packed is None or len(packed) == 4 else packed[:8]


@functools.lru_cache(256)
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
    labels = name.split(b'.')
    if not all(labels) or any(byte <= 32 or byte in b':%\x7f' for byte in name):
        raise ProtocolError(f'host name {shown(host)} is empty in parts, or has characters that '
                            f'no name has')
    if labels[-1][:1].isdigit():        # 127.1, 0x7f1, as resolvers read it
        with contextlib.suppress(OSError):
            return Address(socket.inet_ntoa(socket.inet_aton(name.decode())), port)
    return Address(name.decode(), port)


def shown(text):
    """`text` from a stranger, fit for one word of a log line."""
    return text if text and text.isprintable() and ' ' not in text else ascii(text)


class UnixAddress(Address):
    """The address of a unix socket: its path in the log, 127.0.0.1 without a port in rules."""

    def __new__(cls, path):
        address = super().__new__(cls, '127.0.0.1', 0)
        address.path = path
        return address

    def __str__(self):
        return f'unix:{shown(os.fsdecode(self.path))}'


def local_address(sock):
    """The address of our end of a socket, as rules and log should see it."""
    address = sock.getsockname()
    return canonical(Address.of(address)) if isinstance(address, tuple) else UnixAddress(address)


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
    """Resume with what function() returns or raises; socket.timeout after `until`.

    Of what is costly, that is keeps a processor busy, only little is done at a time.
    """
    function: Callable
    until: Optional[float] = None
    is_costly: bool = False


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


def look_up(host, port):
    """socket.getaddrinfo() where an address is needed, even if a program replaced that function by
    one that hands names through."""
    try:
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, f'{shown(host)} is no host name') from None
    if any(plain_ip(str(sockaddr[0]).partition('%')[0]) is None for *_, sockaddr in found):
        found = _orig_getaddrinfo(host, port, 0, socket.SOCK_STREAM)
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
    found = yield Call(functools.partial(look_up, host.encode(), port), until)
    hosts = (Address.of(sockaddr).host for *_, sockaddr in found)
    return list(dict.fromkeys(Address(plain_ip(host), port) for host in hosts))


class Stream:
    """Messages over a non-blocking socket, up to the time `until`.

    `waits` is what to wait for, if that is another object: the socket below TLS.  What a read
    brings beyond the message stays in `surplus`: first the next message, at last the first bytes
    of the tunnel.
    """
    SIZE = 4096                         # bytes; holds any handshake whole
    LARGEST = 1 << 16                   # surplus
    GONE = 'the client left'

    def __init__(self, sock, until, waits=None):
        self.sock = sock
        self.waits = waits or sock
        self.until = until
        self.surplus = b''
        self._asked = False             # what comes next answers us, so it is not there yet

    def _receive(self, flags=0):
        """Conversation: the bytes that come next."""
        while True:
            if self._asked:
                yield from ready([self.waits], (), self.until)
            try:
                data = self.sock.recv(self.SIZE, flags)
                break
            except BLOCKED:
                self._asked = True
        self._asked = False
        if not data:
            raise EOFError(self.GONE)
        return data

    def read(self, unpack):
        """Conversation: what unpack(read) makes of the next bytes, however they are split.

        Raises EOFError if the peer ends within them, socket.timeout when it takes too long.
        """
        while True:
            if self.surplus:
                read, rest = reader(self.surplus)
                try:
                    message = unpack(read)
                    self.surplus = rest()
                    return message
                except EOFError:
                    pass
            self.surplus += yield from self._receive()

    def read_head(self):
        """Conversation: the bytes of the head of an HTTP request, up to an empty line.

        ProtocolError if it does not begin as one, or is longer than MAX_HEAD.
        """
        data, start, has_line = bytearray(self.surplus), 0, False
        while True:
            end = HttpHead.END.search(data, max(0, start - 2))
            if (end.end() if end else len(data)) > MAX_HEAD:
                raise ProtocolError(f'HTTP head of more than {MAX_HEAD} bytes',
                                    reply=HttpCode.HEAD_TOO_LARGE)
            if not has_line and data.find(b'\n', start) >= 0:
                has_line = re.match(b'[^\n]+ HTTP/[0-9][.][0-9]\r\n', data)
                if not has_line:        # a client of another protocol may wait for us
                    raise ProtocolError(f'{bytes(data[:8])!r}, expected SOCKS or HTTP',
                                        reply=HttpCode.BAD_REQUEST)
            if end:
                self.surplus = bytes(data[end.end():])
                return bytes(data[:end.end()])
            start = len(data)
            data += yield from self._receive()

    def look(self):
        """Conversation: some of the next bytes, which stay in the socket."""
        return self._receive(socket.MSG_PEEK)

    def peek(self):
        """Conversation: the next byte, as a number; it stays there."""
        if not self.surplus:
            self.surplus = yield from self._receive()
        return self.surplus[0]

    def wait_for(self, sockets, until):
        """Conversation: return when one of the sockets is readable, socket.timeout at `until`.

        Meanwhile take what the peer sends, up to LARGEST; EOFError if it ends.
        """
        while True:
            own = [self.waits] if len(self.surplus) < self.LARGEST else []
            found = yield from ready([*sockets, *own], (), until)
            if self.waits not in found:
                return
            with contextlib.suppress(*BLOCKED):         # it may be a part of a layer's message
                data = self.sock.recv(self.SIZE)
                if not data:
                    raise EOFError(self.GONE)
                self.surplus += data

    def write(self, message):
        """Conversation: send all of a message."""
        data = message.pack()
        while data:
            try:
                data = data[self.sock.send(data):]
            except BLOCKED:
                yield from ready((), [self.waits], self.until)
        self._asked = True

    def linger(self, until):
        """Conversation: end our side and wait for the peer to end its own.

        A close with unread bytes would send RST, which may overtake and destroy our last message.
        """
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while True:
                yield from ready([self.waits], (), until)
                with contextlib.suppress(*BLOCKED):
                    if not self.sock.recv(self.SIZE):
                        break


class ExactStream(Stream):
    """A stream that leaves in the socket what is behind a message.

    For the client's side, whose socket goes to a program that must find all that comes after the
    last reply.  So there is never a surplus between messages.
    """
    GONE = 'Connection closed unexpectedly'

    def read(self, unpack):
        while True:
            seen = yield from self.look()
            read, rest = reader(self.surplus + seen)
            try:
                message, left = unpack(read), len(rest())
            except EOFError:
                self.surplus += self.sock.recv(len(seen))
            else:
                self.sock.recv(len(seen) - left)
                self.surplus = b''
                return message


class Layer:
    """Encryption over a non-blocking socket that it owns, as far as a relay needs a socket's
    interface.

    After recv_into() nothing decrypted is left behind, so the socket's readiness tells all, and
    send() counts only what the socket took whole.  The subclass has recv_into() and _seal(data),
    which adds what stands for the first bytes of `data` to _cipher, and tells how many.
    """
    RECORD = 1 << 15                    # more than the bytes of one record
    failure = None                      # the outcome for the log, if the layer knows better

    def __init__(self, sock):
        self._sock = sock
        self._cipher = b''              # made, but not taken by the socket
        self._plain = 0                 # bytes that it stands for
        self._ending = False            # our direction is to end when the socket took all
        self.fileno = sock.fileno
        self.getsockopt = sock.getsockopt
        self.getsockname = sock.getsockname

    def flush(self):
        """Whether the socket took all that there is for it."""
        with contextlib.suppress(*BLOCKED):
            while self._cipher:
                self._cipher = self._cipher[self._sock.send(self._cipher):]
        if self._ending and not self._cipher:
            self._ending = False
            self._sock.shutdown(socket.SHUT_WR)
        elif getattr(self._sock, 'unsent', False):      # a layer below has not ended yet
            self._sock.flush()
        return not self._cipher

    @property
    def unsent(self):
        """Whether there is more for the socket, which nobody will bring again."""
        return self._ending or getattr(self._sock, 'unsent', False)

    def recv(self, size, _=0):
        buffer = bytearray(size + 2 * self.RECORD)
        return bytes(buffer[:self.recv_into(buffer, size)])

    def send(self, data):
        """Send the first bytes; after BlockingIOError the same ones must come again."""
        if not self._plain:
            self._plain = self._seal(data[:1 << 18])
        if not self.flush():
            raise BlockingIOError(errno.EAGAIN, 'the socket is full')
        sent, self._plain = self._plain, 0
        return sent

    def shutdown(self, _):
        """End our direction, and only that."""
        self._ending = True
        self.flush()

    def close(self):
        with contextlib.suppress(OSError):
            self.flush()
        self._sock.close()


class Secure(Layer):
    """TLS.

    It works on memory (ssl.MemoryBIO) rather than on the socket, because that way either side can
    end its direction and go on reading.
    """

    def __init__(self, sock, context, **options):
        import ssl                      # here, because few need it and it is large
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._waits, self._closed = ssl.SSLWantReadError, ssl.SSLZeroReturnError
        self._tls = context.wrap_bio(self._incoming, self._outgoing, **options)
        self._ended = False             # the socket has said all

    def handshake(self, until):
        """Conversation: agree on keys; ssl.SSLError if that fails, socket.timeout if it takes long.
        """
        while True:
            try:
                self._tls.do_handshake()
                done = True
            except self._waits:
                done = False
            finally:                    # also what tells the peer of a failure
                flushed = self.flush()
            while not flushed:
                yield from ready((), [self._sock], until)
                flushed = self.flush()
            if done:
                return
            yield from ready([self._sock], (), until)
            with contextlib.suppress(*BLOCKED):
                self._feed(self.RECORD)
            if self._ended:
                raise EOFError('Connection closed unexpectedly')

    def peer_certificate(self):
        """As SSLSocket.getpeercert() has it; empty without one."""
        return self._tls.getpeercert() or {}

    def flush(self):
        self._cipher += self._outgoing.read()       # the protocol itself may have something to say
        return super().flush()

    def _feed(self, size):
        data = self._sock.recv(size)
        self._incoming.write(data)
        self._ended = not data

    def recv_into(self, buffer, size):
        """Read what the socket has, but of `size` bytes; `buffer` has room for a RECORD more."""
        buffer, count, fed = memoryview(buffer), 0, False
        try:
            while True:
                try:
                    more = self._tls.read(len(buffer) - count, buffer[count:])
                    if not more:
                        break
                    count += more
                except self._waits:
                    with contextlib.suppress(OSError):      # who takes no more may have said more
                        self.flush()
                    if count:
                        return count
                    if fed:
                        raise BlockingIOError(errno.EAGAIN, 'a part of a TLS record') from None
                    self._feed(min(size, len(buffer) - self.RECORD))
                    fed = True
                    if self._ended:     # TLS was not told, which concerns this direction only
                        break
        except self._closed:
            pass
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)     # so that it stays readable: the end is
        return count

    def _seal(self, data):
        return self._tls.write(data)

    def shutdown(self, how):
        with contextlib.suppress(self._waits):
            self._tls.unwrap()
        super().shutdown(how)

    def close(self):
        """Close the socket, and tell the peer that this was no accident, if it can be told."""
        with contextlib.suppress(OSError):
            self._tls.unwrap()
        super().close()


def abort(sock):
    """Close a socket, or a layer, by RST; a layer's own farewell would look like a proper end."""
    while isinstance(sock, Layer):
        sock = sock._sock
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


class GssError(OSError):
    """GSSAPI says no; the text is its own."""


class GssLibrary:
    """What is needed of GSSAPI (RFC 2743, its C bindings in RFC 2744), from the system's Kerberos.

    OSError where it is not there.  Its functions may block.
    """
    NAME = 'libgssapi_krb5.so.2'        # MIT's; others lay out their structures in other ways
    KERBEROS = bytes.fromhex('2a864886f712010202')
    SERVICE_NAME = bytes.fromhex('2a864886f71201020104')        # SERVICE@HOST
    MUTUAL, REPLAY, SEQUENCE, CONF, INTEG = 2, 4, 8, 16, 32
    FOREVER, ACCEPT, FAILED = 0xFFFFFFFF, 2, 0xFFFF0000

    def __init__(self):
        if sys.platform != 'linux':
            raise OSError(errno.ENOSYS, 'GSSAPI: only known on Linux')
        import ctypes                   # here, because few need it
        self._c = ctypes

        class Buffer(ctypes.Structure):
            _fields_ = [('length', ctypes.c_size_t), ('value', ctypes.POINTER(ctypes.c_char))]

        class Oid(ctypes.Structure):
            _fields_ = [('length', ctypes.c_uint32), ('elements', ctypes.c_char_p)]

        self._buffer_class, self._oid_class = Buffer, Oid
        try:
            self._library = ctypes.CDLL(self.NAME)
        except OSError:
            raise OSError(errno.ENOENT, f'GSSAPI: there is no {self.NAME} here') from None

    def call(self, name, *args):
        """The status of gss_NAME(&minor, *args), without errors: it raises GssError for those."""
        minor = self._c.c_uint32()
        function = getattr(self._library, 'gss_' + name)
        function.restype = self._c.c_uint32
        status = function(self._c.byref(minor), *args)
        if status & self.FAILED:
            texts = filter(None, (self._text(status, 1), self._text(minor.value, 2)))
            raise GssError(errno.EACCES, 'GSSAPI: ' + '; '.join(texts))
        return status

    def _text(self, status, kind):
        text, more, minor = self.output(), self._c.c_uint32(), self._c.c_uint32()
        self._library.gss_display_status(
            self._c.byref(minor), self._c.c_uint32(status), kind, None, self._c.byref(more), text)
        return self.taken(text).decode('utf-8', 'replace') if status else ''

    def handle(self):
        return self._c.c_void_p()

    def number(self, value=0):
        return self._c.c_uint32(value)

    def input(self, data):
        """A pointer to a gss_buffer_desc."""
        value = self._c.cast(self._c.c_char_p(data), self._c.POINTER(self._c.c_char))
        return self._c.pointer(self._buffer_class(len(data), value))

    def output(self):
        return self._c.pointer(self._buffer_class())

    def taken(self, output):
        """The bytes that a function put there."""
        buffer, minor = output.contents, self._c.c_uint32()
        data = self._c.string_at(buffer.value, buffer.length) if buffer.length else b''
        self._library.gss_release_buffer(self._c.byref(minor), output)
        return data

    def oid(self, data):
        return self._c.pointer(self._oid_class(len(data), data))

    def reference(self, value):
        return self._c.byref(value)

    def named(self, name):
        """The handle of a name: SERVICE@HOST, or a principal, which has a slash."""
        handle = self.handle()
        self.call('import_name', self.input(name.encode()),
                  None if '/' in name else self.oid(self.SERVICE_NAME), self.reference(handle))
        return handle

    @contextlib.contextmanager
    def keys(self):
        """The handle of the keys of all services that are in the keytab; GssError without any."""
        handle = self.handle()
        self.call('acquire_cred', None, self.number(self.FOREVER), None, self.ACCEPT,
                  self.reference(handle), None, None)
        try:
            yield handle
        finally:
            self.call('release_cred', self.reference(handle))


@functools.lru_cache(1)
def gss_library():
    """The one that is here, loaded when it is first needed."""
    return GssLibrary()


class GssContext:
    """One side of a security context, and at last the level of protection that was agreed on.

    `name` is whom to talk to, SERVICE@HOST; None: accept somebody, whose name is `peer` then.
    """
    CLEAR, INTEGRITY, CONFIDENTIALITY = 0, 1, 2
    DUPLICATE, OLD, OUT_OF_ORDER = 2, 4, 2 | 4 | 8 | 16         # of unwrap's status
    level = CONFIDENTIALITY
    peer = ''

    def __init__(self, name=None, in_sequence=True):
        self._name = name
        self._in_sequence = in_sequence         # datagrams are not
        self._library = gss_library()
        self._context = self._library.handle()
        self._lock = threading.Lock()           # a context serves one thread at a time
        self._flags = 0

    def step(self, token=b''):
        """(token for the other side, whether the context is complete) after one from there."""
        library, output, flags = self._library, self._library.output(), self._library.number()
        function = self._accept if self._name is None else self._initiate
        try:
            status = function(library, token, output, flags)
        finally:
            token = library.taken(output)       # also that of a failure, else it is lost memory
        self._flags = flags.value
        return token, not status

    def _initiate(self, library, token, output, flags):
        name = library.named(self._name)
        wanted = library.MUTUAL | library.REPLAY | library.CONF | library.INTEG
        if self._in_sequence:
            wanted |= library.SEQUENCE
        try:
            return library.call(
                'init_sec_context', None, library.reference(self._context), name,
                library.oid(library.KERBEROS), library.number(wanted), library.number(0),
                None, library.input(token), None, output, library.reference(flags), None)
        finally:
            library.call('release_name', library.reference(name))

    def _accept(self, library, token, output, flags):
        peer, name = library.handle(), library.output()
        with library.keys() as keys:
            status = library.call(
                'accept_sec_context', library.reference(self._context), keys,
                library.input(token), None, library.reference(peer), None, output,
                library.reference(flags), None, None)
        if not status:
            library.call('display_name', peer, name, None)
            library.call('release_name', library.reference(peer))
            self.peer = library.taken(name).decode('utf-8', 'replace')
            if not flags.value & library.REPLAY:        # which RFC 1961 section 3 demands
                raise GssError(errno.EACCES, 'GSSAPI: no protection against replays was asked for')
        return status

    def allows(self, level):
        """Whether the mechanism can do that; its flags say so."""
        needed = {self.CLEAR: 0, self.INTEGRITY: self._library.INTEG,
                  self.CONFIDENTIALITY: self._library.CONF}[level]
        return self._flags & needed == needed

    def wrap(self, data, is_secret):
        library, output = self._library, self._library.output()
        with self._lock:
            library.call('wrap', self._context, int(is_secret), 0, library.input(data),
                         library.reference(library.number()), output)
        return library.taken(output)

    def unwrap(self, token):
        """(data, whether it was encrypted, status)"""
        library, output, is_secret = self._library, self._library.output(), self._library.number()
        with self._lock:
            status = library.call('unwrap', self._context, library.input(token), output,
                                  library.reference(is_secret), None)
        return library.taken(output), bool(is_secret.value), status

    def largest(self):
        """How many bytes one message can protect."""
        library, largest = self._library, self._library.number()
        library.call('wrap_size_limit', self._context, self.level == self.CONFIDENTIALITY, 0,
                     GssMessage.LARGEST, library.reference(largest))
        return largest.value

    def seal(self, data):
        """The bytes of a message that protects `data` at the level; OSError if it is too much."""
        token = self.wrap(data, self.level == self.CONFIDENTIALITY)
        if len(token) > GssMessage.LARGEST:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return GssMessage(GssMessage.DATA, token).pack()

    def open(self, token, forbidden):
        """What a message protects; OSError if it is not what the level promises, or its status is
        one of those forbidden."""
        data, is_secret, status = self.unwrap(token)
        if self.level == self.CONFIDENTIALITY and not is_secret:
            raise OSError(errno.EBADMSG, 'GSSAPI: a message is not encrypted')
        if status & forbidden:
            raise OSError(errno.EBADMSG, 'GSSAPI: a message came twice, late or too early')
        return data

    def __del__(self):
        if getattr(self, '_context', None):
            with contextlib.suppress(OSError):
                self._library.call('delete_sec_context', self._library.reference(self._context),
                                   None)


class HttpForward(Layer):
    """The client's side of one forwarded HTTP request.

    From the client, the body of the request is taken and the rest discarded, so that no second
    request reaches the target.  To the client, the head of the answer says that the connection will
    close (RFC 9112 section 9.6); if the target does not answer in HTTP, the proxy does.  After an
    answer of 101 this is a plain tunnel (RFC 9110 section 7.8).
    """
    INTERIM = 100                       # limit of answers with a status of 1xx

    def __init__(self, sock, request):
        super().__init__(sock)
        self._request = request
        self._body = HttpBody(request.length)
        self._head = bytearray()        # the part that has arrived; None: it was passed on
        self._interim = self.INTERIM
        self._is_over = False           # the client has sent something after its request
        self._is_tunnel = False

    def take(self, data):
        """The part of `data`, from the client, that belongs to the request's body."""
        count = self._body.take(data)
        self._is_over |= count < len(data)
        return data[:count]

    def recv_into(self, buffer, size):
        count = self._sock.recv_into(buffer, size)
        if self._is_tunnel or not count:
            return count
        taken = 0
        if not self.failure:            # else discard it: a reset could overtake our answer
            try:
                taken = len(self.take(memoryview(buffer)[:count]))
            except ProtocolError as error:
                self._fail(HttpCode.BAD_REQUEST, error)
        if not taken:
            raise BlockingIOError(errno.EAGAIN, 'the request is over')
        return taken

    def send(self, data):
        if self.failure:
            raise OSError(errno.EBADMSG, self.failure)
        if self._head is None and not self._cipher and not self._plain:
            return self._sock.send(data)
        return super().send(data)

    def _seal(self, data):
        if self._head is None:
            self._cipher += data
            return len(data)
        start = max(0, len(self._head) - 2)
        self._head += data
        try:
            while self._head is not None and self._pass_head(start):
                start = 0
        except ProtocolError as error:
            self._fail(HttpCode.BAD_GATEWAY, error)
        return len(data)

    def _pass_head(self, start):
        """Pass on the head of an answer, if it is complete; return whether it is."""
        end = HttpHead.END.search(self._head, start)
        if (end.end() if end else len(self._head)) > MAX_HEAD:
            raise ProtocolError(f'HTTP answer with a head of more than {MAX_HEAD} bytes')
        if not end:
            return False
        head, rest = HttpHead.unpack_answer(self._head[:end.end()]), self._head[end.end():]
        code, fields = int(head.start[9:12]), [('Via', f'{head.start[5:8]} socks.py')]
        self._interim -= code < 200
        if not self._interim or code == 101 and (self._is_over or not self._request.upgrade):
            raise ProtocolError(f'unexpected HTTP answer {code} of the target')
        if code == 101:
            fields += ('Connection', 'Upgrade'), ('Upgrade', ', '.join(head.values('upgrade')))
        elif code >= 200:
            fields.append(('Connection', 'close'))
        without = ('content-length',) * bool(head.values('transfer-encoding'))
        self._cipher += HttpHead(head.start, (*head.end_to_end(*without), *fields)).pack()
        self._is_tunnel = code == 101
        self._head = rest
        if code == 101 or code >= 200:
            self._head = None
            self._cipher += rest
        return True

    def _fail(self, code, error):
        """Send an answer in place of the target's, and end; OSError if the target has answered."""
        self.failure = f'{"refused" if code == HttpCode.BAD_REQUEST else "failed"}: {error}'
        if self._head is None:
            raise OSError(errno.EBADMSG, self.failure)
        self._head = None
        self._cipher += HttpAnswer(code, str(error), self._request.method != 'HEAD').pack()
        self.shutdown(socket.SHUT_WR)

    def shutdown(self, how):
        if self._head is not None:
            self._fail(HttpCode.BAD_GATEWAY, 'the target has ended without an HTTP answer')
        elif not self._ending:
            super().shutdown(how)


class Protected(Layer):
    """What GSSAPI protects (RFC 1961 section 5); `incoming` came with the last message before."""
    RECORD = 1 << 16                    # more than the bytes that one message protects

    def __init__(self, sock, context, incoming=b''):
        super().__init__(sock)
        self.context = context
        self._incoming = incoming
        self._largest = context.largest()

    def recv_into(self, buffer, size):
        """Read what the socket has, but of `size` bytes; `buffer` has room for 2 RECORDs more."""
        buffer = memoryview(buffer)
        count = self._open(buffer)
        if not count:
            data = self._sock.recv(min(size, len(buffer) - 2 * self.RECORD))
            if not data:
                if self._incoming:
                    raise ConnectionResetError(errno.ECONNRESET, 'ended within a GSSAPI message')
                return 0
            self._incoming += data
            count = self._open(buffer)
            if not count:
                raise BlockingIOError(errno.EAGAIN, 'a part of a GSSAPI message')
        return count

    def _open(self, buffer):
        """Put into `buffer` what the whole messages have that came; its length."""
        (read, _), used, count = reader(self._incoming), 0, 0
        with contextlib.suppress(EOFError):
            while True:
                try:
                    token = GssMessage.unpack_token(GssMessage.DATA, read)
                except ProtocolError as error:  # nobody that could be answered
                    raise OSError(errno.EBADMSG, str(error)) from None
                data = self.context.open(token, self.context.OUT_OF_ORDER)
                buffer[count:count + len(data)] = data
                count += len(data)
                used += 4 + len(token)
        self._incoming = self._incoming[used:]
        return count

    def _seal(self, data):
        self._cipher += b''.join(self.context.seal(bytes(data[start:start + self._largest]))
                                 for start in range(0, len(data), self._largest))
        return len(data)


class ProtectedDatagrams:
    """A UDP socket each of whose datagrams is a GSSAPI message (RFC 1961 section 5)."""

    def __init__(self, sock, context):
        self._sock = sock
        self.context = context
        self.fileno, self.close, self.connect = sock.fileno, sock.close, sock.connect
        self.getsockname = sock.getsockname

    def recvfrom_into(self, buffer):
        """As of a socket; what is no datagram from the other side of the context is empty."""
        message, source = self._sock.recvfrom(0xFFFF)
        data = opened(self.context, message)
        buffer[:len(data)] = data
        return len(data), source

    def send(self, data):
        self._sock.send(self.context.seal(bytes(data)))

    def sendto(self, data, address):
        self._sock.sendto(self.context.seal(bytes(data)), address)


def opened(context, message):
    """What a datagram protects; nothing if it is wrong, or came before."""
    read, rest = reader(message)
    try:
        token = GssMessage.unpack_token(GssMessage.DATA, read)
        if not rest():
            return context.open(token, context.DUPLICATE | context.OLD)
    except (OSError, EOFError):
        pass
    return b''


def interleave(addresses):
    """The addresses, their families in turn, the first one's first (RFC 8305 section 4)."""
    if len(addresses) == 1:
        return addresses
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
    sock = _orig_socket(family, socket.SOCK_STREAM)
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


def way_out(hosts, source):
    """Our IP address from which the first of `hosts` is reached that is; OSError if none is."""
    for host in hosts:
        family = family_of(host)
        try:
            with _orig_socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((source_of(family, source), 0))
                sock.connect((host, 9))         # which sends nothing
                return sock.getsockname()[0]
        except OSError as caught:
            error = caught
    raise error


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
    sock = _orig_socket(family, kind)
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


def listening_at(path, mode=None):
    """A unix socket that listens at `path`, with these permissions; None: 0600, less the umask.

    A socket file that no server listens on any more is replaced.
    """
    sock = _orig_socket(socket.AF_UNIX)
    umask = os.umask(0o177)             # from the first moment on, nobody else can connect
    try:
        sock.setblocking(False)
        if is_stale(path):
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o600 & ~umask if mode is None else mode)
        sock.listen(1)
        return sock
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f'cannot listen on unix:{path}: {reason(error)}') from None
    finally:
        os.umask(umask)


def is_stale(path):
    """Whether there is a unix socket at `path` on which no server listens."""
    with _orig_socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return (os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode)
                and probe.connect_ex(path) == errno.ECONNREFUSED)


def account_of(sock):
    """The name of the account that has connected to a unix socket (SO_PEERCRED in unix(7)); its
    number if it has no name, '-' if the system does not tell."""
    try:
        import pwd
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, user_id, _ = struct.unpack('iII', peer)
    except (ImportError, AttributeError):
        return '-'
    try:
        return shown(pwd.getpwuid(user_id).pw_name)
    except KeyError:
        return str(user_id)


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

    users               name to password, bytes or text, or to `Hashed`; without users nobody is
                        asked
    open                serve strangers: listen beyond loopback although there are no users
    clients             ip_networks of those who may connect; none: all
    trusted             ip_networks of clients that need no password
    rules               `Rule`s on what may be reached; None: anything that is not local
    upstream            chain of `Proxy` that CONNECT goes through
    tls                 ssl.SSLContext: clients talk to us inside of TLS
    udp_over_plain      allow UDP beside TLS, although datagrams are not encrypted
    gssapi              levels of protection that clients may choose, of `GssContext`; with any, and
                        without users, clients must authenticate by GSSAPI
    gssapi_nec          agree on the level without protection, as NEC's programs do
    ident               ask SOCKS4 clients' hosts whether the userid is right (RFC 1413)
    http                serve HTTP clients, too: CONNECT, and requests for http URLs
    unix_mode           permissions of unix sockets that are made; None: 0600, less the umask
    balancers           ip_networks from which each connection begins with a PROXY header
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
    drain_timeout       for clients that are served when the server is to stop
    max_clients         clients at once; further ones wait in the listen queue
    max_per_client      connections at once from one IP address; further ones are closed
    max_handshakes      clients at once that have not said yet what they want; the one that has
                        taken longest makes room
    """
    users: Mapping[Union[bytes, str], object] = MappingProxyType({})
    open: bool = False
    clients: Tuple = ()
    trusted: Tuple = ()
    rules: Optional[Tuple['Rule', ...]] = None
    upstream: Tuple = ()
    tls: object = None
    udp_over_plain: bool = False
    gssapi: Tuple[int, ...] = ()
    gssapi_nec: bool = False
    ident: bool = False
    http: bool = True
    unix_mode: Optional[int] = None
    balancers: Tuple = ()
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
    drain_timeout: float = 0.0
    max_clients: int = 0
    max_per_client: int = 0
    max_handshakes: int = 0

    def __repr__(self):
        fields = ', '.join(f'{name}={value!r}' for name, value in zip(self._fields, self)
                           if name != 'users')
        return f'Settings({len(self.users)} users, {fields})'       # and no passwords


# What only the proxy's own host should reach: itself, its link (there also live the metadata
# services of clouds), groups, and addresses that are not one host's.
LOCAL_NETWORKS = [ipaddress.ip_network(network) for network in (
    '0.0.0.0/8', '127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '240.0.0.0/4',
    '::/128', '::1/128', 'fe80::/10', 'ff00::/8', 'fd00:ec2::254/128')]

ZEROS = ('0.0.0.0', '::')

# IPv6 networks whose addresses carry an IPv4 one: its place, in bytes.
EMBEDDED = {
    ipaddress.ip_network('::ffff:0:0/96'): 12,          # v4-mapped, RFC 4291
    ipaddress.ip_network('::/96'): 12,                  # v4-compatible, RFC 4291
    ipaddress.ip_network('64:ff9b::/96'): 12,           # NAT64, RFC 6052
    ipaddress.ip_network('2002::/16'): 2,               # 6to4, RFC 3056
}


@functools.lru_cache(4096)
def with_embedded(host):
    """The IP address `host`, and any IPv4 address within it, as ip_addresses."""
    ip = ipaddress.ip_address(host)
    return [ip] + [ipaddress.ip_address(ip.packed[place:place + 4])
                   for network, place in EMBEDDED.items() if ip in network]


@functools.lru_cache(4096)
def is_local(host):
    """Whether the IP address `host`, or an IPv4 address within it, is in LOCAL_NETWORKS."""
    return any(ip in network for ip in with_embedded(host) for network in LOCAL_NETWORKS)


@functools.lru_cache(4096)
def is_loopback(host):
    """Whether the IP address `host` is of this host alone."""
    return ipaddress.ip_address(host).is_loopback


def is_ours(host):
    """Whether the IP address `host` is one of this machine's."""
    with _orig_socket(family_of(host), socket.SOCK_DGRAM) as sock:
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
    if target.host in ZEROS and command != Command.BIND:
        raise Refused(f'{target.host} is no host', reply=Reply.GENERAL_FAILURE)
    if is_loopback(client.host):
        return
    if is_local(target.host):
        raise Refused(f'{target.host} is local to the proxy')
    if any(target.port == listener.port for listener in listeners) and is_ours(target.host):
        raise Refused(f'{target} is the proxy itself')


@functools.lru_cache(4096)
def is_in(host, networks):
    """Whether the IP address `host` is in one of the ip_networks."""
    ip = ipaddress.ip_address(host)
    return any(ip in network for network in networks)


class Rule(NamedTuple):
    """Whether certain clients may reach certain targets.  What is empty holds for all.

    allow      or deny
    commands   of `Command`
    users      names, as they are logged
    clients    ip_networks
    names      that were asked for, in lower case; with a dot before it: those below it, too
    networks   ip_networks of the target
    ports      (lowest, highest) of the target
    place      where it is written
    """
    allow: bool
    commands: Tuple = ()
    users: Tuple = ()
    clients: Tuple = ()
    names: Tuple = ()
    networks: Tuple = ()
    ports: Tuple = ()
    place: str = 'a rule'

    def concerns(self, client, port):
        """Whether it is for what `client` wants, as far as that is not the host."""
        return ((not self.commands or client.command in self.commands)
                and (not self.users or client.user in self.users)
                and (not self.clients or is_in(client.address.host, self.clients))
                and (not self.ports or any(low <= port <= high for low, high in self.ports)))

    def is_for_name(self, name):
        return any(('.' + name).endswith(each) if each[0] == '.' else name == each
                   for each in self.names)

    def is_for_host(self, host, name):
        """`host` is an IP address; `name` the name that stands for it, or None.

        Who denies a network denies the ways around it as well.
        """
        if not (self.names or self.networks) or name and self.is_for_name(name):
            return True
        hosts = [host] if self.allow else map(str, with_embedded(host))
        return any(is_in(each, self.networks) for each in hosts)


def first_rule(rules, client, target, name=None):
    """The rule that decides about an IP address, asked for by `name` or not; Refused without one.
    """
    for rule in rules:
        if rule.concerns(client, target.port) and rule.is_for_host(target.host, name):
            return rule
    raise Refused(f'no rule is for {target}')


def judge_name(rules, client, target, is_final):
    """Raise Refused if whatever address a name may have, `client` may not reach it.

    So what is forbidden is not even looked up.  `is_final`: nor will it be, and its address cannot
    be what makes it allowed.
    """
    for rule in rules:
        if not rule.concerns(client, target.port):
            continue
        is_for_it = not (rule.names or rule.networks) or rule.is_for_name(target.host)
        if is_for_it and not rule.allow:
            raise Refused(f'{rule.place} denies {target}')
        may_be_in_there = rule.allow and rule.networks and not is_final
        if is_for_it or may_be_in_there:
            return
    raise Refused(f'no rule is for {target}')


RULE_COMMANDS = {'connect': (Command.CONNECT,), 'bind': (Command.BIND,),
                 'udp': (Command.UDP_ASSOCIATE,),
                 'resolve': (Command.RESOLVE, Command.RESOLVE_PTR)}


def parse_rule(text, place):
    """The `Rule` of one line, FileError says where and what is wrong:

    allow|deny [connect|bind|udp|resolve ...] [user NAME ...] [from NETWORK ...]
    to NETWORK|NAME|.NAME|* ... [PORT|LOW-HIGH ...]
    """
    word, *words = text.split()
    if word not in ('allow', 'deny'):
        raise FileError(f'{place}: {word!r}, expected allow or deny')
    parts = {'commands': [], 'users': [], 'clients': [], 'names': [], 'networks': [], 'ports': []}
    section, sections = 'commands', {'user': 'users', 'from': 'clients', 'to': 'names'}
    anything = False
    for word in words:
        if word in sections:
            if section == 'names' or section != 'commands' and not parts[section]:
                raise FileError(f'{place}: {word!r} is not expected here')
            section = sections[word]
        elif section == 'commands':
            if word not in RULE_COMMANDS:
                raise FileError(f'{place}: {word!r}, expected connect, bind, udp, resolve, user, '
                                 f'from or to')
            parts['commands'] += RULE_COMMANDS[word]
        elif section == 'names' and re.match('[0-9]+(-[0-9]+)?$', word):
            parts['ports'].append(parse_ports(word, place))
        elif section == 'names' and word == '*':
            anything = True
        elif section == 'users':
            parts['users'].append(shown(word))
        else:
            kind, value = parse_host(word, place, section)
            parts[kind].append(value)
    if section != 'names' or anything == bool(parts['names'] or parts['networks']):
        raise FileError(f'{place}: expected "to", then networks and names, or *')
    return Rule(text.startswith('allow'), place=place,
                **{name: tuple(values) for name, values in parts.items()})


def parse_ports(word, place):
    low, _, high = word.partition('-')
    low, high = int(low), int(high or low)
    if not low <= high < 65536:
        raise FileError(f'{place}: {word!r}, expected PORT or LOW-HIGH, up to 65535')
    return low, high


def parse_network(text):
    """The ip_network of a text, one of v4-mapped addresses as IPv4, as which we know those."""
    network = ipaddress.ip_network(text.strip('[]'))
    if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        return ipaddress.IPv4Network((int(network.network_address) & 0xFFFFFFFF,
                                      network.prefixlen - 96))
    return network


def parse_host(word, place, section):
    """Where a word of `section` belongs, and what it is there."""
    with contextlib.suppress(ValueError):
        return ('clients' if section == 'clients' else 'networks'), parse_network(word)
    if section == 'clients' or '/' in word:
        raise FileError(f'{place}: {word!r}, expected a network, 192.0.2.0/24 for example')
    dot = '.' if word.startswith('.') else ''
    try:
        name = canonical(Address(word[len(dot):], 0)).host
    except ProtocolError as error:
        raise FileError(f'{place}: {error}') from None
    if '*' in name or ':' in name or name.rpartition('.')[2].isdigit():         # it matches nobody
        raise FileError(f'{place}: {word!r}, expected a network, a name, .suffix, or * alone')
    return 'names', dot + name


def read_lines(path):
    """(place, line) of the lines of a file that are neither empty nor comments, bytes."""
    try:
        with open(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                line = re.sub(b'^' + codecs.BOM_UTF8, b'', line).strip()
                if line and not line.startswith(b'#'):
                    yield f'{path}:{number}', line
    except OSError as error:
        raise FileError(f'{path}: {reason(error)}') from None


def read_rules(path):
    """The `Rule`s in a file; FileError says where it is wrong."""
    return tuple(parse_rule(re.split(r'\s#', line.decode('utf-8', 'replace'))[0], place)
                 for place, line in read_lines(path))


class Hashed:
    """A password of which only a hash is known.  It is costly to verify, so what was right once is
    remembered, as a hash that is cheap but whose key nobody has.

    The text is METHOD:PARAMETERS:SALT:HASH, the last two in hexadecimal.
    """
    KEY = os.urandom(32)
    SCRYPT = 'scrypt:16384-8-1'         # n, r, p: 16 MiB and some 50 ms
    PBKDF2 = 'pbkdf2:600000'            # rounds of SHA-256

    def __init__(self, text):
        import hashlib                  # here, because few servers need it
        self._method, parameters, salt, digest = text.split(':')
        self._parameters = [int(number) for number in parameters.split('-')]
        self._salt, self.digest = bytes.fromhex(salt), bytes.fromhex(digest)
        numbers = self._parameters
        if not (self._method == 'pbkdf2' and len(numbers) == 1 and numbers[0] > 0
                or self._method == 'scrypt' and hasattr(hashlib, 'scrypt')
                and len(numbers) == 3 and min(numbers) > 0
                and numbers[0] > 1 and not numbers[0] & numbers[0] - 1
                and numbers[0] * numbers[1] <= 1 << 20 and numbers[2] <= 64):
            raise ValueError(self._method)
        self._right = None

    @classmethod
    def make(cls, password):
        """The text for a password."""
        import hashlib
        kind = cls.SCRYPT if hasattr(hashlib, 'scrypt') else cls.PBKDF2
        start = f'{kind}:{os.urandom(16).hex()}:'
        return start + cls(start + '00')._hash(password).hex()

    def _hash(self, password):
        import hashlib
        if self._method == 'scrypt':
            n, r, p = self._parameters
            return hashlib.scrypt(password, salt=self._salt, n=n, r=r, p=p, dklen=32,
                                  maxmem=256 * n * r)
        return hashlib.pbkdf2_hmac('sha256', password, self._salt, *self._parameters)

    def _quick(self, password):
        import hmac
        return hmac.new(self.KEY, password, 'sha256').digest()

    def is_known(self, password):
        """Whether it was found right before."""
        import hmac
        return self._right is not None and hmac.compare_digest(self._right, self._quick(password))

    def verify(self, password):
        """Whether it is right; takes long."""
        import hmac
        same = hmac.compare_digest(self._hash(password), self.digest)
        if same:
            self._right = self._quick(password)
        return same


def read_users(path):
    """The users in a file of NAME:PASSWORD or NAME:METHOD:...:HASH lines; FileError if it is
    wrong.  Warns if others can read it."""
    users = {}
    for place, line in read_lines(path):
        name, _, password = line.partition(b':')
        if not (0 < len(name) < 256 and 0 < len(password) < 256) or name in users:
            raise FileError(f'{place}: expected NAME:PASSWORD, of 1 to 255 bytes each, and each '
                            f'name once')
        if password.startswith((b'scrypt:', b'pbkdf2:')):
            try:
                password = Hashed(password.decode('ascii'))
                if len(password.digest) != 32:
                    raise ValueError
            except ValueError:
                raise FileError(f'{place}: expected what --hash-password prints, by this Python '
                                f'if it lacks scrypt') from None
        users[name] = password
    if os.name == 'posix' and os.stat(path).st_mode & 0o077:
        log.warning('%s: others can read it', path)
    return users


def authenticate(users, credentials, until=None, is_hopeless=lambda: False):
    """Conversation: whether `credentials` are one of the users'.

    Before costly work begins, is_hopeless() tells whether it is in vain: many may be tried at once.
    """
    import hmac                         # here, because few servers need it and it is large
    password = users.get(credentials.username)
    is_user = password is not None
    if not is_user:                     # let it take as long as if it were
        password = next((each for each in users.values() if isinstance(each, Hashed)), b'')
    if isinstance(password, Hashed):
        def verify():                   # it may be known by now
            return (password.is_known(credentials.password)
                    or not is_hopeless() and password.verify(credentials.password))

        same = password.is_known(credentials.password) or (yield Call(verify, until, True))
    else:
        same = hmac.compare_digest(credentials.password, password)
    return same and is_user


class Failures:
    """How often each client failed to log in of late."""
    LIMIT, WINDOW = 30, 60.0            # failures, seconds
    ROOM = 4096                         # clients that are remembered

    def __init__(self):
        self._since = {}                # by client: [when the first one was, how many there were]

    def note(self, host):
        key, now = client_key(host), time.monotonic()
        if now > self._since.get(key, (now, 0))[0] + self.WINDOW:
            del self._since[key]
        if len(self._since) >= self.ROOM:
            del self._since[next(iter(self._since))]
        self._since.setdefault(key, [now, 0])[1] += 1

    def too_many(self, host):
        since, count = self._since.get(client_key(host), (0, 0))
        return count >= self.LIMIT and time.monotonic() <= since + self.WINDOW


# ------------------------------------------------------------------------------------------ loops

class Poller:
    """The interface of select.epoll(), on what other systems have."""
    READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

    def __init__(self):
        self._selector = selector = selectors.DefaultSelector()
        self.register, self.modify = selector.register, selector.modify
        self.unregister, self.close = selector.unregister, selector.close

    def poll(self, seconds, _):
        return [(key.fd, events) for key, events in self._selector.select(seconds)]


if hasattr(select, 'epoll'):            # selectors has it too, but takes twice as long
    Poller = select.epoll
    READ, WRITE = select.EPOLLIN, select.EPOLLOUT
    ERRORS = select.EPOLLET             # nothing else, and each once
else:
    READ, WRITE = Poller.READ, Poller.WRITE
    ERRORS = 0                          # there one only learns of them when one reads or writes


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
        self.next = float('inf')        # nothing expires before; after, something may

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
                if tick * self.TICK < self.next:
                    self.next = tick * self.TICK

    def pause(self, now):
        """Seconds until there may be something to do."""
        pause = self.next - now
        return LONGEST if pause > LONGEST else pause if pause > 0 else 0

    def expired(self, now):
        """The items whose time has passed; they have none then."""
        ticks = [tick for tick in self._ticks if tick * self.TICK <= now]
        items = [item for tick in sorted(ticks) for item in self._ticks.pop(tick)]
        self.next = min(self._ticks, default=float('inf')) * self.TICK
        for item in items:
            item.due = None
        return items


class Loop:
    """One poller, and one thread at a time in run(), for any number of items.

    An item is a `Task` or a relay.  It has

    client                 whom it serves, or None
    due                    for `Timers`
    ready(fd, events)      a socket that it watches, by its descriptor, is ready: READ and WRITE, or
                           something else, which counts as both
    expire()               its time has passed
    close(outcome)         give everything back

    Other threads use only call() and stop().  `crew` does what blocks, `costly_crew` what also
    takes much of a processor.  relieve(tunnel), if there is one, is called for a tunnel that turned
    out to carry much.
    """
    BUFFER = 1 << 20                    # bytes that one read can bring
    ROUND = 256                         # events at a time
    client = None                       # as an item of itself, for its waker

    def __init__(self, crew=None, relieve=None, costly_crew=None):
        self.crew = crew
        self.costly_crew = costly_crew
        self.relieve = relieve
        self.items = {}                 # as a set, which would take twice the room
        self.timers = Timers()
        self.now = time.monotonic()     # as of this round of events
        # Other than a bytearray's, its memory is only taken as far as it is written to.
        private = {'flags': mmap.MAP_PRIVATE} if os.name == 'posix' else {}
        self.buffer = memoryview(mmap.mmap(-1, self.BUFFER, **private))
        self.held = 0                   # bytes that relays hold because nobody takes them
        self._inbox = deque()
        self._asleep = False
        self._stopping = False
        self.closed = False
        self.waker = Waker()
        self._poller = Poller()
        self._watched = {}              # items by descriptor
        self._stale = set()             # descriptors that may have changed hands since the poll
        self.watch(self.waker, 0, READ, self)

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
        fd = sock.fileno()
        if not wanted:
            if before:
                self._poller.unregister(fd)
                del self._watched[fd]
                self._stale.add(fd)
            return
        if not before:
            self._poller.register(fd, wanted)
        elif wanted != before:
            self._poller.modify(fd, wanted)
        self._watched[fd] = item

    def run(self):
        """Serve the items until stop()."""
        timers, inbox, monotonic = self.timers, self._inbox, time.monotonic
        poll, watched, stale = self._poller.poll, self._watched, self._stale
        while not self._stopping:
            self._asleep = True         # before the look at the inbox: call() may come in between
            found = poll(0 if inbox else timers.pause(monotonic()), self.ROUND)
            self._asleep = False
            self.now = monotonic()
            for fd, events in found:
                if fd in stale:
                    continue
                item = watched[fd]
                try:
                    item.ready(fd, events)
                except Exception:
                    self.failed(item)
            if self.now >= timers.next:
                for item in timers.expired(self.now):
                    self.attempt(item, item.expire)
            while inbox:
                item, function, args = inbox.popleft()
                self.attempt(item, function, *args)
            stale.clear()
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
        self._poller.close()
        self.waker.close()

    def attempt(self, item, function, *args):
        """Call function(*args) on behalf of `item`; what happens to one must not end the others."""
        try:
            function(*args)
        except Exception:
            self.failed(item)

    @staticmethod
    def failed(item):
        """An exception came out of `item`."""
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
    __slots__ = ('client', 'loop', 'due', '_sock', '_events', '_others', '_conversation', '_wish',
                 '_call')
    NOTHING = Wait()

    def __init__(self, client, sock, conversation):
        self.client = client
        self.due = None
        self._sock = sock
        self._events = 0                # that it is watched for
        self._others = []               # sockets that are watched
        self._conversation = conversation
        self._wish = self.NOTHING
        self._call = None               # what the crew is at

    traffic = 0, 0

    def start(self, loop):
        self.loop = loop
        loop.items[self] = True
        self._step(self._conversation.send, None)

    def ready(self, fd, _):
        found = [sock for sock in (*self._wish.reading, *self._wish.writing) if sock.fileno() == fd]
        if found:
            self._step(self._conversation.send, found)
        elif self._conversation and self._sock.fileno() == fd:      # not now; _watch() looks again
            self.loop.watch(self._sock, self._events, 0, self)
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
            self._unwatch()
            self._conversation.close()
            self._end(None)

    def _step(self, advance, value):
        """Resume the conversation and see to what it wants next."""
        self._unwatch()
        self._wish, self._call = self.NOTHING, None
        try:
            wish = advance(value)
        except StopIteration as stop:
            return self._end(stop.value)
        self.loop.timers.set(self, wish.until)
        if isinstance(wish, Call):
            self._call = wish
            try:
                crew = self.loop.costly_crew if wish.is_costly else self.loop.crew
                crew.run(self.client.address.host, self._work, wish)
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
                    self._others.append(sock)
                elif wanted != self._events:
                    self.loop.watch(sock, self._events, wanted, self)
                    self._events = wanted

    def _unwatch(self):
        while self._others:
            self.loop.watch(self._others.pop(), READ, 0, self)

    def _end(self, relay):
        self._conversation = None
        self.loop.timers.set(self, None)
        self.loop.items.pop(self, None)
        if relay:
            self.loop.attempt(relay, relay.start, self.loop, self._events)
        else:
            self.loop.watch(self._sock, self._events, 0, self)
            self._sock.close()


class Crew:
    """Threads that do what blocks; a free one waits a while for the next job before it ends.

    They do at most `share` jobs of one owner at a time, so that nobody keeps them all.
    """

    def __init__(self, size=256, share=64, patience=5.0):
        self._size = size
        self._share = share
        self._patience = patience       # seconds
        self._jobs = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = set()
        self._free = 0                  # threads that wait, less the jobs that do
        self._owners = {}               # by owner: (jobs under way, deque of those that wait)

    def run(self, owner, *job):
        """Call job[0](*job[1:]) in some thread; RuntimeError if there is none and none starts."""
        with self._lock:
            under_way, waiting = self._owners.get(owner, (0, deque()))
            if under_way >= self._share:
                return waiting.append(job)
            if self._free <= 0 and len(self._threads) < self._size:
                thread = threading.Thread(target=self._work, args=(owner, job), name='socks-crew',
                                          daemon=True)
                thread.start()
                self._threads.add(thread)
            else:
                self._free -= 1
                self._jobs.put((owner, job))
            self._owners[owner] = under_way + 1, waiting

    def _work(self, owner, job):
        while job:
            function, *args = job
            try:
                function(*args)
            except Exception:
                log.exception('this is a bug')
            job = function = args = None            # hold nothing while waiting
            job = self._done(owner)
            if not job:
                owner, job = self._next()
        self._threads.discard(threading.current_thread())

    def _done(self, owner):
        """One of the owner's jobs is; the next one, if it had to wait for that."""
        with self._lock:
            under_way, waiting = self._owners[owner]
            if waiting:
                return waiting.popleft()
            self._owners[owner] = under_way - 1, waiting
            if under_way == 1:
                del self._owners[owner]
            self._free += 1
            return None

    def _next(self):
        try:
            return self._jobs.get(timeout=self._patience)
        except Empty:
            with self._lock:
                if self._free > 0:
                    self._free -= 1
                    return None, None
            return self._jobs.get()                 # it came at the last moment

    def dismiss(self):
        """Have all threads end as soon as they are free."""
        self._patience = 0
        with self._lock:
            for _ in range(max(0, self._free)):
                self._free -= 1
                self._jobs.put((None, None))


# ----------------------------------------------------------------------------------------- relays

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
        loop.items[self] = True
        self.expire()

    def expire(self):
        """Close what is idle; come back when it may be."""
        patience = self.client and self.patience
        if patience and self.moved + patience <= time.monotonic():
            self.close('idle')
        elif patience:
            self.loop.timers.set(self, self.moved + patience)

    def leave(self):
        """Belong to no loop."""
        self.loop.timers.set(self, None)
        self.loop.items.pop(self, None)


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

    @property
    def client(self):
        """Whom the loop says it about if something goes wrong here."""
        return self.tunnel.client

    def ready(self, _, events):
        """The loop saw `events` at the source, which is also the twin's sink."""
        # An earlier event of the same round may have changed what is waited for.
        if self.events & READ and events & ~WRITE:
            self.fill()
        elif self.events == ERRORS:
            error = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self.twin.lose(OSError(error, os.strerror(error)))
        if self.events & WRITE and events & ~READ:
            self.twin.flush()

    def fill(self):
        """Read once, and pass on at once what was read."""
        tunnel = self.tunnel
        loop = tunnel.loop
        try:
            count = self.source.recv_into(
                loop.buffer, self.size if loop.held < self.HELD else self.SMALLEST)
        except BLOCKED:
            return
        except OSError as error:
            return tunnel.close(reason(error), reset=True)
        if not count:
            return self.end()
        tunnel.moved = loop.now
        self.count += count
        if count == self.size < self.LARGEST:
            self.grow()
        data, sent = loop.buffer[:count], 0
        try:
            sent = self.sink.send(data)
        except BLOCKED:
            pass
        except OSError as error:
            return self.lose(error)
        if sent < count:
            self.size = self.SMALLEST
            self.keep(memoryview(bytes(data[sent:])))   # the buffer is the whole loop's
            tunnel.watch()

    def grow(self):
        self.size *= 4
        loop = self.tunnel.loop
        if self.size == self.LARGEST and loop.relieve:
            loop.call(self.tunnel, loop.relieve, self.tunnel)

    def flush(self):
        """Send what is loaded, or what TLS has kept."""
        if self.load:
            self.tunnel.moved = self.tunnel.loop.now
            try:
                self.keep(self.load[self.sink.send(self.load):])
            except BLOCKED:
                pass
            except OSError as error:
                return self.lose(error)
            self.tunnel.watch()
        elif getattr(self.sink, 'unsent', False):
            with contextlib.suppress(OSError):
                self.sink.flush()
            self.tunnel.watch()

    def keep(self, load):
        self.tunnel.loop.held += len(load) - len(self.load)
        self.load = load or b''         # an empty view would hold on to all of it

    def end(self):
        """The source has said all: tell the sink; the other direction goes on (half-close)."""
        self.done = True
        if not self.twin.done:                  # else the tunnel's close says it
            try:
                self.sink.shutdown(socket.SHUT_WR)
            except OSError:                     # gone, as the twin will notice
                pass
            self.tunnel.expire()                # it may have to end in time now
        self.tunnel.watch()

    def lose(self, error):
        """The sink is gone.  What it sent before that is still to be read: the twin goes on."""
        self.done = True
        self.keep(b'')
        self.tunnel.error = error
        self.tunnel.watch()

    def watch(self):
        """Have the loop watch the source for what this pipe and its twin wait for there."""
        wanted = ERRORS if self.load or self.done else READ
        if self.twin.load or getattr(self.source, 'unsent', False):
            wanted = wanted & READ | WRITE
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
        return self.client.idle_timeout or self.up.done and self.client.linger

    @property
    def traffic(self):
        """Bytes from the client, and from the target."""
        return self.up.count, self.down.count

    def start(self, loop, near_events=0):
        """Go on in `loop`, which watches the client's socket for `near_events` already."""
        self.begin(loop)
        loop.held += len(self.up.load) + len(self.down.load)
        loop.watch(self.up.source, near_events, near_events, self.up)
        self.up.events = near_events
        self.up.watch()
        self.down.watch()
        self.up.flush()

    def move(self, loop):
        """Go on in another loop."""
        self.leave()
        self.loop = loop
        loop.items[self] = True         # at once, so that it counts as served all the time
        loop.call(self, self.start, loop)

    def leave(self):
        super().leave()
        for pipe in (self.up, self.down):
            if pipe.events:
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
                abort(pipe.source)
            else:
                pipe.source.close()
        client.end(getattr(self.up.source, 'failure', None) or outcome, self.up.count,
                   self.down.count)


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
            self.relay.client.server.judge_name(self.relay.client, address)
        except ProxyError as error:
            return self.relay.drop(error)
        literal = ip_bytes(address.host) is not None
        if not literal and len(self._queues) >= self.LOOKUPS:
            return self.relay.drop('too many names are looked up')
        self._queues[header] = []
        self._queue(header, datagram.payload)
        if literal:
            return self._found(header, [address], None)
        try:
            self.relay.loop.crew.run(self.relay.client.address.host, self._look_up, header, address)
        except RuntimeError:            # no thread to be had
            self._found(header, [], None)

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
        self.relay.loop.call(self.relay, self._found, header, addresses, address.host)

    def _found(self, header, addresses, name):
        """Send what waits to the first address that may be reached and can be, and remember it."""
        payloads = self._queues.pop(header)
        client, why = self.relay.client, 'its name was not found'
        for address in addresses if client else ():
            try:
                client.server.authorize(client, address, name)
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
        self._remember(self.known, header, route)
        self._remember(self.headers, tuple(route[1]), Datagram(route[1], b'').pack())

    def _remember(self, known, key, value):
        """As the latest one; what was learned first is forgotten when there are too many."""
        known.pop(key, None)
        if len(known) >= self.LIMIT:
            del known[next(iter(known))]
        known[key] = value

    def forget(self):
        """Judge all targets anew."""
        for known in (self.known, self.headers, self._failed):
            known.clear()

    def meet(self, source):
        """The header for a sender to whom the client did not send, if that is allowed."""
        if self.relay.client.server.settings.udp_strict:
            return None
        self._remember(self.headers, source, Datagram(Address.of(source), b'').pack())
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

    @property
    def traffic(self):
        """Bytes of payload from the client, and from targets."""
        return self.up, self.down

    def start(self, loop, control_events=0):
        self.begin(loop)
        loop.watch(self.control, control_events, READ, self)
        loop.watch(self.near, 0, READ, self)

    def ready(self, fd, _):
        if fd == self.near.fileno():
            self.from_client()
        elif fd == self.control.fileno():
            self.listen()
        else:
            self.from_target(next(sock for sock in self.far.values() if sock.fileno() == fd))

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


# ----------------------------------------------------------------------------------------- client

SOCKS4, SOCKS5, HTTP = 1, 2, 3          # PySocks' numbers
TLS, GSSAPI = 0x10, 0x20                # may be added: inside of this
LAYERS = TLS | GSSAPI
SCHEMES = {                             # of proxy URLs: type, whether the proxy resolves names
    'socks4': (SOCKS4, False), 'socks4a': (SOCKS4, True), 'socks5': (SOCKS5, False),
    'socks5h': (SOCKS5, True), 'socks': (SOCKS5, True), 'http': (HTTP, True),
    'https': (HTTP | TLS, True)}
TYPE_NAMES = {SOCKS4: 'SOCKS4', SOCKS5: 'SOCKS5', HTTP: 'HTTP'}
SOCKS5_ERRORS = {int(code): code.text for code in Reply if code != Reply.SUCCEEDED}
SOCKS4_ERRORS = {int(code): code.text for code in Reply4 if code != Reply4.GRANTED}
DEFAULT_PORTS = {SOCKS4: 1080, SOCKS5: 1080, HTTP: 8080}
SETUP_TIMEOUT = 60.0                    # seconds, where a caller cannot wait and set none
KEEPIDLE = 60                           # seconds until a silent program is looked for
INTERIM = {100, 102, 103}               # of HTTP: the answer is still to come (RFC 9110 15.2)


class Proxy(NamedTuple):
    """A proxy and how to use it; the six fields are those that PySocks' programs know.

    type        SOCKS4, SOCKS5 or HTTP; with TLS added, inside of TLS; SOCKS5 with GSSAPI added:
                it authenticates us by that, and all is encrypted then, or only signed if the
                proxy wants it so
    addr        host name, IP address, or path of a unix socket, which begins with a slash
    port        0 or None: the usual one
    rdns        whether the proxy resolves names
    username    bytes; of SOCKS4, the userid; of GSSAPI, the service, rcmd unless given, or
                a principal, which has a slash
    password    bytes
    """
    type: int
    addr: str
    port: Optional[int] = None
    rdns: bool = True
    username: Optional[bytes] = None
    password: Optional[bytes] = None

    @classmethod
    def checked(cls, proxy_type, addr, port=None, rdns=True, username=None, password=None):
        """One of a caller's arguments; GeneralProxyError or ValueError says which is wrong."""
        kind = proxy_type & ~LAYERS if isinstance(proxy_type, int) else None
        if kind not in TYPE_NAMES:
            what = proxy_type if isinstance(proxy_type, int) else type(proxy_type).__name__
            raise GeneralProxyError(f'Invalid proxy type: {what}')
        addr = addr.decode() if isinstance(addr, bytes) else addr
        if not isinstance(addr, str) or not addr or addr[0] != '/' and min(addr) <= ' ':
            raise ValueError(f'proxy address {addr!r}: expected a name or an IP address')
        if port is not None and not (isinstance(port, int) and 0 <= port < 65536):
            raise ValueError(f'proxy port {port!r}: expected a number up to 65535')
        if isinstance(rdns, (str, bytes)):
            raise ValueError('rdns: expected True or False')
        username, password = encoded(username) or None, encoded(password) or None
        if proxy_type & GSSAPI and kind != SOCKS5:
            raise ValueError('GSSAPI: expected a proxy of type SOCKS5')
        if proxy_type & GSSAPI and (password or not is_utf8(username or b'')):
            raise ValueError('GSSAPI: expected a service name in UTF-8 and no password')
        if kind == SOCKS5:
            Credentials(username or b'', password or b'').pack()
        if kind == SOCKS4 and username and (b'\0' in username or len(username) > MAX_USERID):
            raise ValueError(f'userid: expected at most {MAX_USERID} bytes, none of them 0')
        if kind == HTTP and username and b':' in username:
            raise ValueError('user name for an HTTP proxy: expected no colon')
        addr = addr[1:-1] if addr.startswith('[') and addr.endswith(']') else addr
        return cls(proxy_type, addr, port, rdns, username, password)

    def __repr__(self):
        secret = '' if self.username is None and self.password is None else ' with credentials'
        return f'<{self}{secret}>'

    def __str__(self):
        kind = ''.join((TYPE_NAMES[self.type & ~LAYERS], '+TLS' if self.type & TLS else '',
                        '+GSSAPI' if self.type & GSSAPI else ''))
        place = self.addr if self.is_path else Address(self.addr, self.sure_port)
        return f'{kind} proxy {place}'

    @property
    def is_path(self):
        return self.addr.startswith('/')

    @property
    def sure_port(self):
        return self.port or (443 if self.type == HTTP | TLS else DEFAULT_PORTS[self.type & ~LAYERS])


def parse_proxy_url(url):
    """The `Proxy` of a URL, SCHEME://[USER[:PASSWORD]@]HOST[:PORT]; ValueError says what is wrong.

    Schemes: socks5h and socks4a, where the proxy resolves names, socks5 and socks4, where we do,
    http, and https for HTTP inside of TLS.  With +tls added, inside of TLS; with +gssapi added,
    authenticated and protected by GSSAPI, USER is the service then; with +unix added, the path is
    that of a unix socket.  User and password are percent-decoded.
    """
    from urllib.parse import unquote, unquote_to_bytes, urlsplit
    try:
        parts = urlsplit(url)
    except ValueError:                  # its text may have the password
        raise ValueError('proxy URL: malformed') from None
    scheme, *layers = parts.scheme.split('+')
    if scheme not in SCHEMES or set(layers) - {'tls', 'gssapi', 'unix'}:
        raise ValueError(f'proxy URL: scheme {parts.scheme!r}, expected one of '
                         f'{", ".join(SCHEMES)}, with +tls, +gssapi or +unix')
    kind, rdns = SCHEMES[scheme]
    kind |= TLS * ('tls' in layers) | GSSAPI * ('gssapi' in layers)
    try:
        port = parts.port
    except ValueError:
        raise ValueError('proxy URL: bad port, expected a number up to 65535') from None
    addr = parts.hostname
    if 'unix' in layers or addr == 'localhost' and len(parts.path) > 1:     # so has curl it
        addr = unquote(parts.path)
        if not addr.startswith('/'):
            raise ValueError('proxy URL: expected the path of a unix socket')
    elif parts.path not in ('', '/') or parts.query or parts.fragment:
        raise ValueError('proxy URL: there is something behind host and port')
    if not addr:
        raise ValueError('proxy URL: there is no host')
    username, password = (text and unquote_to_bytes(text)
                          for text in (parts.username, parts.password))
    return Proxy.checked(kind, addr, port, rdns, username, password)


def hops(proxy):
    """The chain of `Proxy`, first hop first, that is meant by a URL, a tuple of arguments as
    set_proxy() takes them, a list of those, or None."""
    if not proxy:
        return []
    if isinstance(proxy, str):
        return [parse_proxy_url(proxy)]
    if isinstance(proxy, list):
        chain = [hop for item in proxy for hop in hops(item)]
        if any(hop.is_path for hop in chain[1:]):
            raise ValueError('proxy chain: a unix socket can only be the first')
        return chain
    if proxy[0] is None or isinstance(proxy[0], (str, list)):
        return hops(proxy[0])
    return [Proxy.checked(*proxy)]


def is_bypassed(host, patterns):
    """Whether `host` is to be reached without a proxy.

    patterns: separated by commas or spaces; a name stands for itself and all below it, with or
    without a dot before it; IP addresses and networks (10.0.0.0/8) for those; * for everything.
    """
    ip, name = plain_ip(host), host.lower().rstrip('.')
    for pattern in patterns.lower().replace(',', ' ').split():
        if pattern == '*':
            return True
        if ip:
            with contextlib.suppress(ValueError):
                network = ipaddress.ip_network(pattern.strip('[]'), strict=False)
                if ipaddress.ip_address(ip) in network:
                    return True
        elif ('.' + name).endswith('.' + pattern.strip('.')):
            return True
    return False


def proxy_from_environment(host=None):
    """The URL in all_proxy or ALL_PROXY; None without one, or if no_proxy names `host`."""
    url, bypass = (os.environ.get(name) or os.environ.get(name.upper())
                   for name in ('all_proxy', 'no_proxy'))
    return None if not url or host and bypass and is_bypassed(host, bypass) else url


@contextlib.contextmanager
def negotiating():
    """Raise what goes wrong while talking to a proxy as PySocks does: the cause is `socket_err`.

    The class is that of the cause, if it is one of ours, so that either can be asked for.
    """
    try:
        yield
    except (OSError, EOFError) as error:
        cause = GeneralProxyError(str(error)) if isinstance(error, EOFError) else error
        kind = type(cause) if isinstance(cause, GeneralProxyError) else GeneralProxyError
        wrapped = kind('Socket error', cause, reply_for(cause))
        wrapped.errno = (errno.EACCES if isinstance(cause, SOCKS5AuthError) else system_errno(cause)
                         or REPLY_ERRNOS.get(wrapped.reply, errno.ECONNABORTED))
        raise wrapped from cause


def system_errno(error):
    """The errno of an error, if it is one of the system: a resolver's and OpenSSL's are others."""
    return None if isinstance(error, socket.gaierror) or hasattr(error, 'library') else error.errno


def ask(stream, proxy, command, address):
    """Conversation: have `proxy` do `command` for `address`; the address it answers with, BND."""
    kind = proxy.type & ~LAYERS
    if kind == SOCKS5 and not proxy.type & GSSAPI:
        yield from authenticate5(stream, proxy)
    if not proxy.rdns and ip_bytes(address.host) is None:
        found = yield from resolve(canonical(address), stream.until)
        address = min(found, key=lambda address: kind == SOCKS4 and ':' in address.host)
        if kind == SOCKS4 and ':' in address.host:
            raise SOCKS4Error(f'{address.host}: SOCKS4 has no IPv6 addresses')
    if kind == SOCKS5:
        yield from stream.write(Request(command, address))
        return (yield from stream.read(unpack_answer5))
    if kind == SOCKS4:
        yield from stream.write(Request4(command, address, proxy.username or b''))
        return (yield from stream.read(unpack_answer4))
    if command != Command.CONNECT:
        raise HTTPError('HTTP proxies have CONNECT only', reply=Reply.COMMAND_NOT_SUPPORTED)
    credentials = (proxy.username or b'') + b':' + (proxy.password or b'')
    yield from stream.write(HttpConnect(address, credentials.strip(b':') and credentials))
    return (yield from answer_http(stream))


def authenticate5(stream, proxy):
    """Conversation: what comes before a SOCKS5 request."""
    credentials = Credentials(proxy.username or b'', proxy.password or b'')
    offered = b'\0\2' if any(credentials) else b'\0'
    yield from stream.write(Greeting(offered))
    method = (yield from stream.read(Choice.unpack)).method
    if method == Method.NO_ACCEPTABLE:
        raise SOCKS5AuthError('All offered SOCKS5 authentication methods were rejected')
    if method not in offered:
        if method == Method.USERNAME_PASSWORD:
            raise SOCKS5AuthError('No username/password supplied. Server requested '
                                  'username/password authentication')
        raise ProtocolError(f'the proxy chose method {method:#04x}, which was not offered')
    if method == Method.USERNAME_PASSWORD:
        yield from stream.write(credentials)
        if (yield from stream.read(Verdict.unpack)).status:
            raise SOCKS5AuthError('SOCKS5 authentication failed')


def unpack_answer5(read):
    """BND of a SOCKS5 reply; the code alone decides, whatever is behind it."""
    code = Response.unpack_reply(read)
    if code:
        raise SOCKS5Error(f'{code:#04x}: {SOCKS5_ERRORS.get(code, "Unknown error")}', reply=code)
    return Address.unpack(read)


def unpack_answer4(read):
    """The address in a SOCKS4 reply."""
    code, address = Response4.unpack(read)
    if code != Reply4.GRANTED:
        raise SOCKS4Error(f'{code:#04x}: {SOCKS4_ERRORS.get(code, "Unknown error")}')
    return address


def answer_http(stream):
    """Conversation: UNSPECIFIED, once the head of an answer that grants a tunnel is read."""
    code = None
    for _ in range(MAX_LINES):
        if not code:
            code, phrase = yield from stream.read(HttpStatus.unpack)
            if not 200 <= code < 300 and code not in INTERIM:
                note = ('; it may be that this proxy makes no tunnels (CONNECT)'
                        if code in (400, 403, 405) else '')
                raise HTTPError(f'{code}: {phrase}{note}')
        elif not (yield from stream.read(http_line)):
            if code not in INTERIM:
                return UNSPECIFIED
            code = None
    raise ProtocolError(f'more than {MAX_LINES} lines in the head of an HTTP answer')


class Carried:
    """Whom a tunnel of our own serves: nobody that is logged or has a limit.

    But what a program has closed looks as if only one direction had ended, and must not stay where
    the loop does not learn of errors.
    """
    address, idle_timeout, linger = 'a layer', 0, 0 if ERRORS else 300.0

    def end(self, *_):
        """There is no line to write."""


def carrier():
    """The loop, in a thread of its own, that joins layers to the sockets that programs get."""
    return carrier_of(os.getpid())      # a fork has no threads


@functools.lru_cache(1)
def carrier_of(_):
    loop = Loop()
    threading.Thread(target=loop.run, name='socks-tls', daemon=True).start()
    atexit.register(deliver, loop)
    return loop


def deliver(loop, patience=5.0):
    """Wait, for `patience` seconds at most, until the loop has taken what programs have sent."""
    until = after(patience)
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError):      # a socket was closed just now
            pipes = [tunnel.up for tunnel in list(loop.items)]
            if not any(pipe.load or not pipe.done and poll([pipe.source], (), time.monotonic())
                       for pipe in pipes):
                return
        time.sleep(0.01)


def tcp_pair():
    """Two non-blocking TCP sockets that are connected to each other, unlike those of socketpair(),
    which programs could not set TCP's options on."""
    with bound(Address('127.0.0.1', 0)) as listener:
        listener.listen(1)
        near, _ = start_connect(Address.of(listener.getsockname()), ())
        try:
            poll([listener], (), after(1))
            far, address = listener.accept()
            if address != near.getsockname():
                far.close()
                raise OSError(errno.ECONNABORTED, 'somebody else connected')
        except BaseException:
            near.close()
            raise
    far.setblocking(False)
    return near, far


@functools.lru_cache(4)
def usual_context(*_):
    """The ssl.SSLContext of a client; to read all certificates that it trusts takes long."""
    import ssl
    return ssl.create_default_context()


def secured(sock, proxy, context, until):
    """Conversation: a plain socket, in front of TLS over (a duplicate of) `sock` to `proxy`."""
    context = context or usual_context(
        *(os.environ.get(name) for name in ('SSL_CERT_FILE', 'SSL_CERT_DIR')))
    name = 'localhost' if proxy.is_path else proxy.addr
    tls = Secure(sock.dup(), context, server_hostname=name)
    try:
        yield from tls.handshake(until)
        return in_front(tls)
    except BaseException:
        tls.close()
        raise


class Front(_orig_socket):
    """The plain socket that a program gets in front of a layer; `context` protects datagrams."""
    __slots__ = ('context',)


def in_front(layer, context=None):
    """A `Front` of the layer, which belongs to the loop of carrier() then."""
    near, far = tcp_pair()
    if hasattr(socket, 'TCP_KEEPIDLE'):
        # What a program has closed looks as if only one direction had ended, until one asks.
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPIDLE)
    front = Front(near.family, socket.SOCK_STREAM, 0, near.detach())
    front.setblocking(False)
    front.context = context
    tunnel = Tunnel(Carried(), far, layer)
    carrier().call(tunnel, tunnel.start, carrier())
    carrier().call(tunnel, tunnel.down.fill)            # it may have come with the handshake
    return front


def protected(sock, proxy, in_sequence, until):
    """Conversation: a plain socket, in front of GSSAPI over (a duplicate of) `sock` to `proxy`."""
    stream = ExactStream(sock, until)
    yield from stream.write(Greeting(bytes((Method.GSSAPI,))))
    if (yield from stream.read(Choice.unpack)).method != Method.GSSAPI:
        raise SOCKS5AuthError('The SOCKS5 proxy does not accept GSSAPI')
    try:
        context = yield from initiate(stream, proxy, in_sequence)
    except GssError as error:
        raise SOCKS5AuthError(error.strerror) from None
    layer = Protected(sock.dup(), context)
    try:
        return in_front(layer, context)
    except BaseException:
        layer.close()
        raise


def initiate(stream, proxy, in_sequence):
    """Conversation: a complete `GssContext` with the proxy, and its level (RFC 1961 section 4).

    While the library talks to the KDC, a caller's timeout does not count, as in a name look-up.
    """
    service = name_text(proxy.username or b'rcmd')
    host = 'localhost' if proxy.is_path else proxy.addr
    context = GssContext(service if '/' in service else f'{service}@{host}', in_sequence)
    token, complete = yield Call(context.step, stream.until)
    while True:
        if token:
            yield from stream.write(GssMessage(GssMessage.TOKEN, token))
        if complete:
            break
        token = yield from read_token(stream, GssMessage.TOKEN)
        token, complete = yield Call(functools.partial(context.step, token), stream.until)
    best = bytes((max(level for level in range(3) if context.allows(level)),))
    yield from stream.write(GssMessage(GssMessage.LEVEL, context.wrap(best, False)))
    level, _, _ = context.unwrap((yield from read_token(stream, GssMessage.LEVEL)))
    if level not in (b'\1', b'\2'):
        raise SOCKS5AuthError(f'The proxy chose GSSAPI level {level.hex()}, expected 01 or 02')
    context.level = level[0]
    return context


def read_token(stream, kind):
    message = yield from stream.read(GssMessage.unpack)
    if message.kind != kind:
        raise SOCKS5AuthError('The SOCKS5 proxy does not accept us by GSSAPI')
    return message.token


@contextlib.contextmanager
def connecting(proxy):
    """Raise what goes wrong on the way to `proxy` as ProxyConnectionError."""
    try:
        yield
    except OSError as error:
        wrapped = ProxyConnectionError(f'Error connecting to {proxy}', error)
        wrapped.errno = system_errno(error)
        raise wrapped from error


def await_connect(sock, address, until):
    """Conversation: connect the non-blocking `sock` to `address`."""
    try:
        sock.connect(address)
    except BLOCKED:
        yield from ready((), [sock], until)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error)) from None
        sock.connect_ex(address)        # Linux would let the next connect() succeed, too


def open_proxy(proxy, until=None, source=()):
    """Conversation: a non-blocking socket that is connected to `proxy`."""
    with connecting(proxy):
        if not proxy.is_path:
            found = yield Call(functools.partial(look_up, proxy.addr, proxy.sure_port), until)
            addresses = dict.fromkeys(Address.of(sockaddr) for *_, sockaddr in found)
            return (yield from dial(list(addresses), until, source))
        sock = _orig_socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            yield from await_connect(sock, proxy.addr, until)
            return sock
        except BaseException:
            sock.close()
            raise


def destination(pair, chain):
    """The `Address` that a caller's (host, port, ...) means; GeneralProxyError if the proxies of
    the chain could not be told."""
    if not (isinstance(pair, (tuple, list)) and 2 <= len(pair) <= 4 and pair[0]
            and isinstance(pair[0], (str, bytes)) and isinstance(pair[1], int)
            and 0 <= pair[1] < 65536):
        raise GeneralProxyError('Invalid destination-connection (host, port) pair')
    host = name_text(pair[0]) if isinstance(pair[0], bytes) else pair[0]
    host = host[1:-1] if host.startswith('[') and host.endswith(']') else host
    address = Address.of((host, pair[1]))
    address = Address(plain_ip(address.host) or address.host, address.port)
    for proxy, (host, port) in zip(chain, targets(chain, address)):
        if proxy.type & ~LAYERS == SOCKS4 and ':' in host:
            raise GeneralProxyError(f'{host}: SOCKS4 has no IPv6 addresses')
        canonical(Address(host, port))
        try:
            Address(host, port).pack()
        except ValueError as error:
            raise GeneralProxyError(f'{shown(host)}: {error}') from None
    return address


def targets(chain, address):
    """What each proxy of the chain is asked for: the next proxy, at last `address`."""
    return [Address(proxy.addr, proxy.sure_port) for proxy in chain[1:]] + [address]


def through(sock, chain, command, address, until=None, context=None):
    """Conversation: over `sock`, which is connected to the first proxy of the chain, have each
    proxy connect to the next, and the last one do `command` for `address`.

    The result is the socket to go on with, another one where a layer is in between, and BND.
    """
    sockets = [sock]
    try:
        with negotiating():
            bnd = yield from ask_all(sockets, chain, command, address, until, context)
    except BaseException:
        for made in sockets[1:]:        # all of it, and at once
            abort(made)
        raise
    for made in sockets[1:-1]:          # a layer further in has duplicates of these
        made.close()
    return sockets[-1], bnd


def ask_all(sockets, chain, command, address, until, context):
    """Conversation: the part of through() that can fail; `sockets` has the first one, and gets a
    further one for each layer."""
    for proxy, target in zip(chain, targets(chain, address)):
        if proxy.type & TLS:
            sockets.append((yield from secured(sockets[-1], proxy, context, until)))
        step = command if target is address else Command.CONNECT
        if proxy.type & GSSAPI:
            sockets.append((yield from protected(
                sockets[-1], proxy, step != Command.UDP_ASSOCIATE, until)))
        bnd = yield from ask(ExactStream(sockets[-1], until), proxy, step, target)
    return bnd


def reach(chain, address, until=None, source=(), context=None, command=Command.CONNECT):
    """Conversation: a new socket through the proxies of the chain, and BND, as through() has it."""
    sock = last = yield from open_proxy(chain[0], until, source)
    try:
        last, bnd = yield from through(sock, chain, command, address, until, context)
        if command in (Command.BIND, Command.UDP_ASSOCIATE):
            bnd = yield from reachable(bnd, chain, sock, until)
    except BaseException:
        sock.close()
        last.close()
        raise
    if last is not sock:
        sock.close()
    return last, bnd


def reachable(bnd, chain, sock, until):
    """Conversation: `bnd`, where the proxy waits, for those who do not know the proxy's address.

    It is on the last proxy if it names no host, one that is not known, or a private address of
    a public proxy.  `sock` is connected to the first one.
    """
    proxy_host = plain_ip(chain[-1].addr) or '127.0.0.1'        # this: beyond a unix socket
    if len(chain) == 1 and sock.family != socket.AF_UNIX:
        proxy_host = plain_ip(Address.of(sock.getpeername()).host)
    with contextlib.suppress(OSError):
        for host, port in (yield from resolve(canonical(bnd), until)):
            ip = ipaddress.ip_address(host)
            if not ip.is_unspecified and (
                    ip.is_global or not ipaddress.ip_address(proxy_host).is_global):
                return Address(host, port)
    return Address(proxy_host, bnd.port)


# ----------------------------------------------------------------------------------------- server

LINGER = 2.0                            # seconds, see Stream.linger
LOGIN_DELAY = 1.0                       # seconds until a wrong password is answered
PROXY_TIMEOUT = 5.0                     # seconds for a load balancer's header
IDENT_PORT = 113
IDENT_TIMEOUT = 10.0                    # seconds for all of it (RFC 1413 wants more)
ACCEPT_BATCH = 8                        # at a time: other clients, and workers, have their turn
ACCEPT_PAUSE = 0.1                      # seconds until the next try when there is no room
NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
TLS_HANDSHAKE = 0x16                    # first byte of a TLS connection
DESCRIPTORS_KEPT = 32                   # for all that is not a client

# First bytes of an HTTP request: those of a token (RFC 9110 section 5.6.2).
HTTP_BYTES = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
                       b'ABCDEFGHIJKLMNOPQRSTUVWXYZ')
HTTP_HELP = """

This port is a proxy for SOCKS4, SOCKS4a, SOCKS5 and HTTP; it has no pages of its own.
Set it in your program as a proxy: http://... or socks5h://..."""
HTTP_PAGE = b"""\
HTTP/1.0 501 Not Implemented\r
Content-Type: text/plain; charset=us-ascii\r
Connection: close\r
\r
This port speaks SOCKS4, SOCKS4a and SOCKS5, not HTTP.\r
Set it in your program as a SOCKS proxy (socks5h://...), not as an HTTP proxy.\r
"""


METHOD_NAMES = {Method.NO_AUTHENTICATION: '00', Method.GSSAPI: '01, GSSAPI,',
                Method.USERNAME_PASSWORD: '02, a password'}


class HttpPage(NamedTuple):
    """The answer to a program that takes us for an HTTP proxy."""

    def pack(self):
        return HTTP_PAGE


class Line(NamedTuple):
    """What is logged of one client."""
    client: Address
    user: str
    protocol: str
    command: str
    target: str
    outcome: str
    up: int                             # bytes from the client
    down: int                           # and from the target
    seconds: float

    def __str__(self):
        return '%s %s %s %s %s: %s, %d bytes up, %d down, %.3f s' % self


class Client:
    """What is known of one client, from accept to the log line at its end."""
    linger = 0                          # see `Carried`
    __slots__ = ('server', 'address', 'peer', 'is_counted', 'protocol', 'user', 'command',
                 'target', 'started')

    def __init__(self, server, address):
        self.server = server
        self.address = address          # a load balancer may tell of another than the peer's
        self.peer = address
        self.is_counted = False         # see `Roster`
        self.protocol = self.user = self.target = '-'
        self.command = None             # a `Command`
        self.started = time.monotonic()

    @property
    def idle_timeout(self):
        """For a tunnel, in seconds."""
        return self.server.settings.idle_timeout

    def end(self, outcome, up=0, down=0):
        """Write the client's line, if there is an outcome.

        up and down are the bytes that came from the client and from the target.
        """
        self.server.client_ended(self, up, down)
        if outcome and log.isEnabledFor(logging.INFO):
            log.info(self.line(outcome, up, down))

    def line(self, outcome, up, down):
        return Line(self.address, self.user, self.protocol,
                    self.command.name if self.command else '-', self.target, outcome, up, down,
                    time.monotonic() - self.started)


class Login(socketserver.BaseRequestHandler):
    """How a client shows who it is, in any of the ways that the settings ask for."""

    def __init__(self, request, client, server):
        self.request = request
        self.client = client
        self.client_address = client.address
        self.server = server
        self.settings = settings = server.settings
        self.stream = Stream(request, after(self.settings.handshake_timeout))
        self.connection = request       # what carries the bytes: the socket, or a layer over it
        self.reached = None             # where, if a load balancer says so
        self.is_known = False           # and needs no password
        self.answer_form = None         # (reply, bound address) -> the message that says so now
        self.outcome = None             # the end of the client's log line; None: no line

    def secure(self):
        """Go on inside of TLS; a client that shows a certificate is known by its name."""
        first = (yield from self.stream.look())[0]
        if first != TLS_HANDSHAKE:      # who speaks SOCKS would wait for us, and we for more
            raise ProtocolError(f'first byte {first:#04x}, expected TLS')
        self.client.protocol = 'TLS'
        tls = Secure(self.request, self.settings.tls, server_side=True)
        yield from tls.handshake(self.stream.until)
        self.stream = Stream(tls, self.stream.until, self.request)
        self.connection = tls
        subject = dict(pair for part in tls.peer_certificate().get('subject', ()) for pair in part)
        if subject:
            self.client.user = shown(subject.get('commonName', ''))
            self.is_known = True

    @property
    def needs_login(self):
        return bool(self.settings.users or self.settings.gssapi) and not self.is_known

    def choose(self, offered):
        """The authentication method to use, of those offered.

        A client that needs no password but insists on one may send any.
        """
        methods = [] if self.needs_login else [Method.NO_AUTHENTICATION]
        if self.settings.gssapi:
            methods.append(Method.GSSAPI)
        if self.settings.users or not self.needs_login:
            methods.append(Method.USERNAME_PASSWORD)
        for method in methods:
            if method in offered:
                return method
        raise Refused(f'methods offered: {offered.hex() or "none"}, expected '
                      + ' or '.join(METHOD_NAMES[method] for method in methods))

    def authenticate(self, credentials):
        """Raise Refused, but not at once, unless the credentials are right.

        The time that a failure takes does not tell why, and slows down who tries all passwords.
        """
        if not (self.needs_login and self.settings.users):
            return
        self.client.user = shown(name_text(credentials.username))
        host, until = self.client.address.host, after(LOGIN_DELAY)
        failures, why = self.server.failures, 'too many wrong passwords'
        if not failures.too_many(host):
            if (yield from authenticate(self.settings.users, credentials, self.stream.until,
                                        functools.partial(failures.too_many, host))):
                return
            failures.note(host)
            why = 'wrong user name or password'
        yield Wait((), (), until)
        raise Refused(why)

    def protect(self):
        """GSSAPI (RFC 1961): authenticate each other, and go on at the level that is agreed on."""
        self.answer_form = lambda *_: GssMessage(GssMessage.ABORT)
        try:
            context = yield from self.establish()
            yield from self.agree(context)
        except GssError as error:
            raise Refused(error.strerror) from None
        self.client.user = shown(context.peer)
        if context.level:
            self.connection = Protected(self.connection, context, self.stream.surplus)
            self.stream = Stream(self.connection, self.stream.until, self.request)

    def establish(self):
        """A complete `GssContext`, whose peer is the client."""
        context, complete = GssContext(), False
        unpack = functools.partial(GssMessage.unpack_token, GssMessage.TOKEN)
        while not complete:
            token = yield from self.stream.read(unpack)
            if not token:               # MIT's library would take it for a wish for SPNEGO
                raise ProtocolError('an empty GSSAPI token')
            token, complete = yield Call(
                functools.partial(context.step, token), self.stream.until)
            if token or complete:
                yield from self.stream.write(GssMessage(GssMessage.TOKEN, token))
        return context

    def agree(self, context):
        """On the level that the client wants, if it may, or else on the best one."""
        token = yield from self.stream.read(
            functools.partial(GssMessage.unpack_token, GssMessage.LEVEL))
        is_nec = self.settings.gssapi_nec and len(token) == 1
        wanted = token if is_nec else context.unwrap(token)[0]
        levels = [level for level in self.settings.gssapi if context.allows(level)]
        if len(wanted) != 1 or not levels:
            raise ProtocolError(f'GSSAPI level {wanted.hex()}, expected one byte'
                                if levels else 'GSSAPI: no level is possible')
        context.level = wanted[0] if wanted[0] in levels else max(levels)
        answer = bytes((context.level,))
        yield from self.stream.write(GssMessage(
            GssMessage.LEVEL, answer if is_nec else context.wrap(answer, False)))

    def identify(self, userid):
        """Raise Refused unless the client's host says that this is who has the connection."""
        until, userid_there = after(IDENT_TIMEOUT), None
        reached = self.reached or Address.of(self.request.getsockname())
        query = IdentQuery(self.client.address.port, reached.port)
        try:
            source = () if self.reached else (canonical(reached).host,)
            ident = Address(self.client.address.host, IDENT_PORT)
            sock = yield from dial([ident], until, source)
            with sock:
                stream = Stream(sock, until)
                yield from stream.write(query)
                userid_there = (yield from stream.read(IdentReply.unpack)).userid
        except (OSError, EOFError) as error:
            raise Refused(f'ident: {reason(error)}', reply=Reply4.NO_IDENTD) from None
        if userid_there is None:
            raise Refused('ident: the host does not tell', reply=Reply4.NO_IDENTD)
        if userid_there != userid:
            raise Refused(f'ident: it is {shown(name_text(userid_there))}',
                          reply=Reply4.IDENT_MISMATCH)
        self.client.user = shown(name_text(userid))


class Negotiation(Login):
    """What is said with one client, up to its relay or its refusal; all of it conversations.

    converse: negotiate, then command(request) of the subclass, whose result is the relay.
    """

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
            yield from self.prepare()
            request = yield from self.negotiate()
            self.server.roster.negotiating.pop(self.client, None)
        except ProxyError as error:
            return (yield from self.refuse(error))
        except (OSError, EOFError) as error:    # the client's own connection: nobody to answer
            if self.answer_form or self.client.protocol != '-':
                self.outcome = f'no request: {reason(error)}'
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
        is_ours = isinstance(error, ProxyError) and not error.socket_err        # not a proxy's
        outcome = f'{"refused" if is_ours else "failed"}: {reason(error)}'
        self.outcome = outcome if outcome.isprintable() else ascii(outcome)
        address = isinstance(error, Refused) and error.address or UNSPECIFIED
        if self.answer_form:
            with contextlib.suppress(OSError):
                yield from self.answer(reply_for(error), address)
                yield from self.stream.linger(after(LINGER))

    def prepare(self):
        """What comes before the first byte of SOCKS."""
        settings = self.settings
        if settings.balancers and is_in(self.client.peer.host, settings.balancers):
            header = yield from ExactStream(self.request, after(PROXY_TIMEOUT)).read(
                ProxyHeader.unpack)
            if header.source:
                self.client.address = canonical(header.source)
                self.reached = header.destination
        if isinstance(self.client.address, UnixAddress):
            self.client.user = yield Call(functools.partial(account_of, self.request),
                                          self.stream.until)
        self.server.admit(self.client)
        if settings.trusted:
            self.is_known = is_in(self.client.address.host, settings.trusted)
        if settings.tls:
            yield from self.secure()

    def negotiate(self):
        """The client's request, after all that comes before it."""
        first = yield from self.stream.peek()
        if first == 4:
            return (yield from self.negotiate4())
        if first == 5:
            return (yield from self.negotiate5())
        if first in HTTP_BYTES:
            return (yield from self.negotiate_http())
        if first == TLS_HANDSHAKE:
            raise ProtocolError('TLS, expected SOCKS')
        raise ProtocolError(f'first byte {first:#04x}, expected 0x04 or 0x05')

    def negotiate4(self):
        self.client.protocol = 'SOCKS4'
        self.answer_form = Response4.of
        request = yield from self.stream.read(Request4.unpack)
        if self.needs_login:
            raise Refused('SOCKS4 has no passwords, expected SOCKS5')
        if self.settings.ident and not isinstance(self.client.address, UnixAddress):
            yield from self.identify(request.userid)
        return request

    def negotiate5(self):
        self.client.protocol = 'SOCKS5'
        self.answer_form = lambda *_: Choice(Method.NO_ACCEPTABLE)
        greeting = yield from self.stream.read(Greeting.unpack)
        method = self.choose(greeting.methods)
        yield from self.stream.write(Choice(method))
        if method == Method.GSSAPI:
            yield from self.protect()
        elif method == Method.USERNAME_PASSWORD:
            self.answer_form = lambda *_: Verdict(1)
            yield from self.authenticate((yield from self.stream.read(Credentials.unpack)))
            yield from self.stream.write(Verdict(0))
        self.answer_form = Response
        return (yield from self.stream.read(Request.unpack))

    def negotiate_http(self):
        """The request of an HTTP client, which is answered when its target is connected."""
        self.client.protocol = 'HTTP'
        if not self.settings.http:
            self.answer_form = lambda *_: HttpPage()
            raise ProtocolError('HTTP, expected SOCKS')
        self.answer_form = functools.partial(self.http_answer, '')
        request = HttpRequest.unpack((yield from self.stream.read_head()))
        self.answer_form = functools.partial(self.http_answer, request.method)
        if self.needs_login:
            yield from self.authenticate_http(request)
        try:
            canonical(request.address)
        except ProtocolError as error:
            raise ProtocolError(error.msg, reply=HttpCode.BAD_REQUEST) from None
        return request

    def http_answer(self, method, reply, _):
        """The message that gives `reply` to an HTTP client.

        For what our rules or the network say, it has only the reply's own text: the error's could
        tell addresses and paths that are not for the client.
        """
        if reply == Reply.SUCCEEDED:
            return HttpAnswer(HttpCode.OK if method == 'CONNECT' else None)
        code = reply if isinstance(reply, HttpCode) else HTTP_CODES.get(reply, HttpCode.BAD_GATEWAY)
        text = self.outcome if code is reply else code.text
        if isinstance(reply, Reply) and reply != Reply.GENERAL_FAILURE:
            text = reply.text
        return HttpAnswer(code, text + HTTP_HELP * (code == HttpCode.BAD_REQUEST), method != 'HEAD')

    def authenticate_http(self, request):
        """Basic authentication (RFC 7617), with the users and limits of SOCKS5."""
        if not self.settings.users:
            raise Refused('HTTP has no GSSAPI here, expected SOCKS5', reply=HttpCode.FORBIDDEN)
        answer_form = self.answer_form
        self.answer_form = lambda *_: answer_form(HttpCode.LOGIN_REQUIRED, None)
        credentials = request.credentials
        if not credentials:
            raise Refused('no user name and password, expected Basic')
        yield from self.authenticate(credentials)
        self.answer_form = answer_form


COMMANDS = {int(command): command for command in Command}
METHODS = {command: 'do_' + command.name for command in Command}


class Handler(Negotiation):
    """What a client can ask for: a method do_COMMAND for each `Command`.

    One that is not there, or that the settings switch off, is refused as not supported.
    """

    def command(self, request):
        command = COMMANDS.get(request.command)
        method = command and getattr(self, METHODS[command], None)
        if not (method and self.offered(command, isinstance(request, Request4))):
            name = command.name if command else f'command {request.command:#04x}'
            raise ProtocolError(f'{name} is not supported, or not switched on',
                                reply=Reply.COMMAND_NOT_SUPPORTED)
        self.client.command = command
        self.client.target = shown(str(request.address))
        log.debug('%s: %s', self.client.address, request)
        return method(request)

    def offered(self, command, is_socks4):
        """Whether the protocol has the command, and the settings allow it at all."""
        settings = self.settings
        if command in (Command.CONNECT, Command.FORWARD):
            return True
        if command == Command.BIND:             # does not go through other proxies
            return not settings.upstream
        if command == Command.UDP_ASSOCIATE:    # nor does this, nor through TLS
            return not (is_socks4 or settings.upstream
                        or settings.tls and not settings.udp_over_plain)
        return settings.tor_extensions and not (is_socks4 and command == Command.RESOLVE_PTR)

    def do_CONNECT(self, request):
        if not request.address.port:
            raise ProtocolError('port 0, expected 1 to 65535')
        until = self.stream.until = after(self.settings.connect_timeout)
        if self.settings.upstream:
            return (yield from self.connect_through(request.address, until))
        addresses = yield from self.destinations(request.address, until)
        if log.isEnabledFor(logging.DEBUG):
            log.debug('%s: dialling %s', self.client.address, ' '.join(map(str, addresses)))
        target = yield from dial(addresses, until, self.settings.source)
        return (yield from self.join(target, Address.of(target.getsockname())))

    def do_FORWARD(self, request):
        """Forward one HTTP request, through a connection as CONNECT makes it."""
        self.client.command = HttpMethod(request.method)
        layer = HttpForward(self.connection, request)
        surplus = layer.take(self.stream.surplus)
        self.stream.surplus = request.forwarded().pack() + surplus
        self.connection = layer
        return (yield from self.do_CONNECT(request))

    def join(self, target, bnd):
        """Answer, and join the client to the socket `target`."""
        try:
            yield from self.answer(Reply.SUCCEEDED, bnd)
            return Tunnel(self.client, self.connection, target, self.stream.surplus)
        except BaseException:
            target.close()
            raise

    def connect_through(self, address, until):
        """CONNECT by way of other proxies, the last of which looks a name up; we do not."""
        settings, address = self.settings, self.permitted(address)
        if ip_bytes(address.host) is not None:
            self.server.authorize(self.client, address)
        target, bnd = yield from reach(
            settings.upstream, destination(address, settings.upstream), until, settings.source)
        if ip_bytes(bnd.host) is None:
            bnd = UNSPECIFIED
        return (yield from self.join(target, bnd))

    def do_BIND(self, request):
        """Accept one connection, of the peer that the client named, on its behalf.

        Others are turned away; if one of them was all that came, the second reply says so.
        """
        until = self.stream.until = after(self.settings.bind_timeout)
        expected = [host for host, _ in (yield from self.destinations(request.address, until))]
        host, told = self.own_address(expected)
        with bound(Address(host, 0)) as listener:
            listener.listen(16)
            yield from self.answer(Reply.SUCCEEDED, Address(told, listener.getsockname()[1]))
            peer, address = yield from self.accept(listener, expected, until)
        return (yield from self.join(peer, address))

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
            if any(host in (address.host, *ZEROS) for host in expected):
                peer.setblocking(False)
                return peer, address
            stranger = address
            peer.close()

    def do_UDP_ASSOCIATE(self, request):
        """Relay datagrams; DST may be where the client will send from, or anything."""
        host, told = self.own_address()
        near = bound_in(host, self.settings.udp_ports)
        if isinstance(self.connection, Protected):
            near = ProtectedDatagrams(near, self.connection.context)
        try:
            yield from self.answer(Reply.SUCCEEDED, Address(told, near.getsockname()[1]))
            return UdpRelay(self.client, self.connection, near, self.hint(request.address))
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
        wanted = self.permitted(request.address)
        addresses = yield from resolve(wanted, until)
        address = min(addresses, key=lambda address: ':' in address.host)
        self.server.judge(self.client, address, wanted.host)
        if ':' in address.host and isinstance(request, Request4):
            raise ProtocolError(f'{address.host}: SOCKS4 has no IPv6 addresses')
        yield from self.tell(Address(address.host, 0))

    def do_RESOLVE_PTR(self, request):
        """Tor's command for the name of an IP address."""
        host = plain_ip(request.address.host)
        if host is None:
            raise ProtocolError('RESOLVE_PTR of a name, expected an IP address',
                                reply=Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        self.server.judge(self.client, Address(host, 0))
        until = self.stream.until = after(self.settings.connect_timeout)
        name, _ = yield Call(functools.partial(
            socket.getnameinfo, (host, 0), socket.NI_NAMEREQD), until)
        yield from self.tell(canonical(Address(name, 0)))

    def tell(self, address):
        """Answer with an address, which is all that was asked for."""
        self.outcome = f'done, {address.host}'
        yield from self.answer(Reply.SUCCEEDED, address)
        yield from self.stream.linger(after(LINGER))

    def own_address(self, peers=ZEROS):
        """Our IP address for others to connect or send to, and how to tell it to the client.

        The one from which we reach one of the peers, or if these are not known the one that the
        client reached us at; or the one to advertise; that may be another host's which forwards to
        us, so it is not always one to listen on.
        """
        host, _ = local_address(self.request)
        if not set(peers) & set(ZEROS):
            family = family_of(host)    # which the client knows how to use
            host = way_out(sorted(peers, key=lambda peer: family_of(peer) != family),
                           self.settings.source)
        for told in self.settings.advertise:
            if family_of(told) == family_of(host) and not is_loopback(host):
                return (told if is_ours(told) else host), told
        return host, host

    def permitted(self, address):
        """The canonical address; Refused if rules forbid its name."""
        address = canonical(address)
        self.server.judge_name(self.client, address)
        return address

    def destinations(self, address, until):
        """The IP addresses behind `address` that this client may reach; at least one."""
        allowed, refusal, wanted = [], None, self.permitted(address)
        name = wanted.host if ip_bytes(wanted.host) is None else None
        for candidate in (yield from resolve(wanted, until)):
            try:
                self.server.authorize(self.client, candidate, name)
            except Refused as error:
                refusal = error
            else:
                allowed.append(candidate)
        if not allowed:
            raise refusal
        return allowed


def prepared(settings):
    """The settings with users as bytes; OSError if `source` is not ours, or GSSAPI has no keys."""
    for host in settings.source:
        if not is_ours(host):
            raise OSError(errno.EADDRNOTAVAIL, f'cannot connect from {host}: it is not ours')
    if settings.gssapi:
        with gss_library().keys():
            pass
    users = {encoded(name): encoded(password)
             for name, password in settings.users.items()}
    return settings._replace(users=MappingProxyType(users))


def clients_possible():
    """How many clients, each with a target, the limit of open files allows; 0: any number."""
    if not resource:                    # Windows, whose select() takes 512 sockets
        return (512 - DESCRIPTORS_KEPT) // 2
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 0 if soft == resource.RLIM_INFINITY else max(4, (soft - DESCRIPTORS_KEPT) // 2)


def bound_to_all(host, port):
    """Sockets bound to all addresses of `host` that are here; OSError if none is."""
    try:
        addresses = run(resolve(Address(host, 0)))
    except OSError as error:
        raise OSError(error.errno, f'cannot listen on {host}: {reason(error)}') from None
    missing, sockets = None, []
    for ip, _ in addresses:
        try:
            sockets.append(bound(Address(ip, port)))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for sock in sockets:
                    sock.close()
                raise
            missing = error
        else:
            port = sockets[-1].getsockname()[1]     # a free one serves all of them
    if not sockets:
        raise missing
    return sockets


def remove_files(files):
    """Remove the files, (path, its os.stat()), except those that another program has replaced."""
    while files:
        path, known = files.pop()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), known):
                os.unlink(path)


def refuse_open_proxy(settings, addresses):
    """Raise ValueError if strangers could reach one of the addresses, and nobody has allowed it."""
    if not (settings.users or settings.gssapi or settings.clients or settings.open
            or settings.tls and settings.tls.verify_mode):      # CERT_NONE is 0
        for address in addresses:
            if not is_loopback(address.host):
                raise ValueError(
                    f'listening on {address} without users would serve everybody; give users '
                    f'(--users, SOCKS_USERS, -u) or networks (--from), or allow that (--open)')


class Roster:
    """Whom a server serves, and what it did for others before.

    negotiating   tasks by client, in the order in which they began, of those that have not said
                  yet what they want
    hosts         connections by client's IP address, if that is limited
    ended         clients before, who sent `up` bytes and got `down`
    """

    def __init__(self):
        self.negotiating, self.hosts = {}, {}
        self.ended = self.up = self.down = 0
        self._lock = threading.Lock()   # for the threads of all loops

    def add(self, client, task, limit):
        """A client begins to negotiate; the first of more than `limit` makes room."""
        self.negotiating[client] = task
        if len(self.negotiating) > limit:
            next(iter(self.negotiating.values())).close('others want to begin, too')

    def count(self, client, limit):
        """Raise Refused if there are so many connections from its address."""
        host = client.address.host
        with self._lock:
            if self.hosts.get(host, 0) >= limit:
                raise Refused('too many connections from there')
            self.hosts[host] = self.hosts.get(host, 0) + 1
            client.is_counted = True

    def remove(self, client, up, down):
        with self._lock:
            self.negotiating.pop(client, None)
            self.ended += 1
            self.up += up
            self.down += down
            if client.is_counted:
                host = client.address.host
                self.hosts[host] -= 1
                if not self.hosts[host]:
                    del self.hosts[host]


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


class Acceptor(socketserver.ThreadingTCPServer):
    """What accepts clients: in a loop, as the item that it watches the listeners for.

    So one thread does all that is quick, and no connection has to wait for another one to wake up.
    The subclass has listeners, loop, roster, settings, max_clients, loops() and clients.
    """
    client = due = None                 # as an item of its loop; `due`: the end of a pause
    _accepting = _starving = _draining = False

    def _watch_listeners(self, accepting):
        if accepting != self._accepting:
            self._accepting = accepting
            for sock in self.listeners:
                self.loop.watch(sock, READ * (not accepting), READ * accepting, self)

    def ready(self, fd, _):
        listener = next(sock for sock in self.listeners if sock.fileno() == fd)
        for _ in range(min(ACCEPT_BATCH, self._room())):
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
        if self._room() <= 0:
            self._pause()

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

    def _room(self):
        """For how many more clients."""
        return self.max_clients - sum(
            len(loop.items) for loop in self.loops()) if self.max_clients else ACCEPT_BATCH

    def _pause(self):
        """Leave clients in the listen queue until another one ends, or for ACCEPT_PAUSE."""
        self._watch_listeners(False)
        self.loop.timers.set(self, self.loop.now + ACCEPT_PAUSE)

    def expire(self):
        """Accept again; or the time for draining has passed."""
        self.loop.timers.set(self, None)
        if self._draining:
            self.loop.stop()
        else:
            self._watch_listeners(True)

    def drain(self, seconds):
        """Accept no more clients, and have serve_forever() return when those that are served have
        ended, or after so many seconds."""
        self.loop.call(self, self._drain, seconds)

    def _drain(self, seconds):
        self._watch_listeners(False)
        self._draining = True
        for sock in self.listeners:
            sock.close()
        self.loop.timers.set(self, self.loop.now + seconds)
        self._go_on()

    def _go_on(self):
        """There is room again; or the last client may have ended."""
        if not self._draining:
            self.expire()
        elif not self.clients:
            self.loop.stop()

    def client_ended(self, client, up, down):
        """A client is served no more; called in the thread of any loop."""
        self.roster.remove(client, up, down)
        if not self._accepting:
            self.loop.call(self, self._go_on)

    def admit(self, client):
        """Raise Refused unless `client` may use the server at all."""
        settings = self.settings
        if settings.clients and not is_in(client.address.host, settings.clients):
            raise Refused('not from the networks served')
        if settings.max_per_client:
            self.roster.count(client, settings.max_per_client)

    def close(self, outcome):
        """As an item of its loop; the listeners are closed by server_close()."""


class Server(Acceptor):
    """A SOCKS server on one or several addresses.

    server_address   (host, port), or a list of them; a name stands for all its addresses, port 0
                     for a free port, the same on all of them.  The host `unix:PATH` stands for
                     a unix socket, whatever the port; its file is removed at the end.
    listeners        sockets that listen already, to use instead
    settings         a `Settings`
    handler_class    a `Handler`

    To run it: serve_forever(), which returns after shutdown() from another thread or from a signal
    handler; or start(), which runs it in the background until it is closed::

        with Server(('127.0.0.1', 0)).start() as server:
            print(server.server_address)

    To decide more: override verify_request() for who may connect, authorize() for where they may
    go, or a do_COMMAND method of the handler.

    Raises OSError for an address that cannot be listened on, and ValueError for an address beyond
    loopback if the settings would have it serve everybody there.
    """
    request_queue_size = 1024
    heavy_loops = min(4, os.cpu_count() or 1)       # threads for what carries much

    def __init__(self, server_address=('127.0.0.1', 1080), settings=None, handler_class=Handler,
                 bind_and_activate=True, listeners=()):
        addresses = server_address
        if addresses and isinstance(addresses[0], str):
            addresses = [addresses]
        socketserver.BaseServer.__init__(self, addresses, handler_class)
        self.settings = prepared(settings or Settings())
        self.max_clients = self.settings.max_clients or clients_possible()
        self.max_handshakes = self.settings.max_handshakes or max(64, self.max_clients // 2)
        self.listeners = [*listeners]   # sockets
        self.addresses = []             # theirs, as `Address`
        self.socket_files = []          # (path, its os.stat()), to remove at the end
        self.failures = Failures()
        self.roster = Roster()
        self._thread = None             # that of start()
        self._serving = threading.RLock()
        self._crew = Crew()
        self._helpers = Helpers(self.heavy_loops)
        self._costly_crew = Crew(2)
        self.loop = Loop(self._crew, self._helpers.take, self._costly_crew)
        if bind_and_activate:
            try:
                self.server_bind()
                self.server_activate()
            except BaseException:
                self.server_close()
                raise

    def server_bind(self):
        free_port = 0
        for host, port in () if self.listeners else self.server_address:
            if host.startswith('unix:'):
                path = os.path.abspath(host[5:])
                self.listeners.append(listening_at(path, self.settings.unix_mode))
                self.socket_files.append((path, os.stat(path)))
                continue
            self.listeners += bound_to_all(host, port or free_port)
            if not port:
                free_port = self.listeners[-1].getsockname()[1]
        for sock in self.listeners:
            sock.setblocking(False)
            self.addresses.append(local_address(sock))
        refuse_open_proxy(self.settings, self.addresses)
        self.socket = self.listeners[0]
        self.server_address = self.addresses[0]

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
        remove_files(self.socket_files)
        self._crew.dismiss()
        self._costly_crew.dismiss()
        self._helpers.stop()
        for loop in self.loops():
            loop.close()

    # One client

    def process_request(self, request, client_address):
        """Begin the conversation with a client; the loop goes on with it."""
        request.setblocking(False)
        if isinstance(client_address, tuple):
            address = Address.of(client_address)
            if ':' in address.host:     # it may be IPv4 on a socket for both
                address = canonical(address)
        else:
            address = UnixAddress(request.getsockname())
        client = Client(self, address)
        handler = self.RequestHandlerClass(request, client, self)
        task = Task(client, request, handler.converse())
        self.roster.add(client, task, self.max_handshakes)
        self.loop.attempt(task, task.start, self.loop)

    def handle_error(self, request, client_address):
        log.exception('%s: this is a bug', client_address)

    def authorize(self, client, target, name=None):
        """Raise Refused unless `client`, a `Client`, may reach `target`, the `Address` of an IP
        address, for which it asked by `name`, if it did.

        Only a rule on a network can allow what is local to the proxy.
        """
        rule = self.judge(client, target, name)
        if not (rule and rule.networks and is_in(target.host, rule.networks)
                and target.host not in ZEROS):
            authorize(client.address, client.command, target, self.addresses)

    def judge(self, client, target, name=None):
        """Raise Refused if the rules do not allow it; else the one that does, or None."""
        if self.settings.rules is None:
            return None
        rule = first_rule(self.settings.rules, client, target, name)
        if not rule.allow:
            raise Refused(f'{rule.place} denies {target}')
        return rule

    def judge_name(self, client, target):
        """Raise Refused if rules forbid the name in `target`, an `Address`, if it has one."""
        settings = self.settings
        if settings.rules is not None and ip_bytes(target.host) is None:
            judge_name(settings.rules, client, target, bool(settings.upstream))

    def reconfigure(self, settings):
        """Have other settings from now on: who is served goes on, datagrams are judged anew."""
        self.settings = prepared(settings)
        for loop in self.loops():
            for item in list(loop.items):
                if isinstance(item, UdpRelay):
                    loop.call(item, item.routes.forget)

    @property
    def clients(self):
        """All that are served now, as a list of `Client`."""
        clients = (item.client for loop in self.loops() for item in list(loop.items))
        return [client for client in clients if client]     # it may be ending

    def loops(self):
        """All that carry clients."""
        return [self.loop, *self._helpers.loops]


# ------------------------------------------------------------------------------------ socket face
#
# The client half as sockets: what PySocks 1.7.1 has, by the same names, and more in the same style.
# A socket without a proxy is a stock socket in every respect.

PROXY_TYPE_SOCKS4, PROXY_TYPE_SOCKS5, PROXY_TYPE_HTTP = SOCKS4, SOCKS5, HTTP
PROXY_TYPES = {name: number for number, name in TYPE_NAMES.items()}
PRINTABLE_PROXY_TYPES = TYPE_NAMES
NO_PROXY = (None,) * 6
# The defaults of a stock socket's family, type and proto, which ask the descriptor since 3.7.
STOCK = (-1,) * 3 if sys.version_info >= (3, 7) else (socket.AF_INET, socket.SOCK_STREAM, 0)

if ContextVar is None:                  # Python 3.6: a value for each thread only
    class ContextVar(threading.local):
        def __init__(self, name, default=None):
            self.value = default

        def get(self):
            return self.value

        def set(self, value):
            before, self.value = self.value, value
            return before

        reset = set

_scope = ContextVar('socks_default_proxy', default=None)       # as _default() gives it


def arguments(proxy_type, addr=None, port=None, rdns=True, username=None, password=None):
    """The 6-tuple that set_proxy() keeps: a `Proxy`, or one whose first field is a chain or None.

    That field may be a URL, or a list of them and of such tuples: a chain, first hop first.
    """
    if proxy_type is None:
        return None, addr, port, rdns, encoded(username), encoded(password)
    if not isinstance(proxy_type, (str, list)):
        return Proxy.checked(proxy_type, addr, port, rdns, username, password)
    chain = hops(proxy_type)
    if not chain:
        return NO_PROXY
    first = chain[0]
    return first if len(chain) == 1 else (chain, first.addr, first.port, first.rdns, None, None)


def set_default_proxy(proxy_type=None, addr: Optional[str] = None, port: Optional[int] = None,
                      rdns: bool = True, username=None, password=None, *, bypass: str = ''):
    """Set the proxy of all socksockets made from now on, unless set_proxy() gives them another.

    The arguments are those of socksocket.set_proxy().  `bypass` names hosts that are reached
    without it, as is_bypassed() has it: 'localhost, 127.0.0.0/8, .local'.
    """
    socksocket.default_proxy = arguments(proxy_type, addr, port, rdns, username, password)
    socksocket.default_bypass = bypass


def setdefaultproxy(*args, **kwargs):
    """set_default_proxy(), also with `proxytype` for `proxy_type`."""
    if 'proxytype' in kwargs:
        kwargs['proxy_type'] = kwargs.pop('proxytype')
    return set_default_proxy(*args, **kwargs)


@contextlib.contextmanager
def default_proxy(proxy, bypass: str = ''):
    """Within a `with`, and only in this thread or task, have another default proxy.

    proxy   URL, list of URLs for a chain, 6-tuple as set_proxy() takes it, or None for none
    """
    chosen = arguments(*proxy) if isinstance(proxy, tuple) else arguments(proxy)
    token = _scope.set((chosen, bypass))
    try:
        yield
    finally:
        _scope.reset(token)


def _default(kind=None):
    """The default proxy of a class of sockets, as a 6-tuple, and what to bypass it for."""
    kind = kind or socksocket
    return _scope.get() or (kind.default_proxy, kind.default_bypass)


def get_default_proxy() -> Optional[tuple]:
    """The default proxy, as a 6-tuple, or None if none was ever set."""
    return _default()[0]


getdefaultproxy = get_default_proxy


def wrap_module(module, dns: bool = False):
    """Have the module `socket` that `module` imported make socksockets, for the whole process.

    With `dns`, names are not looked up here any more but handed to the proxy, see getaddrinfo().
    Raises GeneralProxyError if there is no default proxy.
    """
    if not get_default_proxy():
        raise GeneralProxyError('No default proxy specified')
    module.socket.socket = socksocket
    if dns:
        module.socket.getaddrinfo = getaddrinfo


def unwrap_module(module):
    """Undo wrap_module()."""
    module.socket.socket = _orig_socket
    if module.socket.getaddrinfo is getaddrinfo:
        module.socket.getaddrinfo = _orig_getaddrinfo


wrapmodule, unwrapmodule = wrap_module, unwrap_module


def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
    """socket.getaddrinfo(), but a name that the default proxy is to resolve is its own address.

    So no look-up leaves this machine, and connect() has the name, also one to be reached directly.
    """
    text = name_text(host) if isinstance(host, bytes) else host
    chain = hops(get_default_proxy())
    if (not text or not chain or not chain[-1].rdns or flags & socket.AI_NUMERICHOST
            or ip_bytes(text.partition('%')[0]) is not None):
        return _orig_getaddrinfo(host, port, family, type, proto, flags)
    number = _orig_getaddrinfo(None, port, 0, type)[0][4][1] if port else 0
    sockaddr = (text, number, 0, 0) if family == socket.AF_INET6 else (text, number)
    kinds = [(socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP)]
    return [(family or socket.AF_INET, kind, protocol, '', sockaddr) for kind, protocol in kinds
            if type in (0, kind) and proto in (0, protocol)]


def set_self_blocking(function):
    """Decorator of a socket's method: let it block, whatever the socket's mode is."""
    @functools.wraps(function)
    def blocking(self, *args, **kwargs):
        timeout = self.gettimeout()
        if timeout == 0:
            self.setblocking(True)
        try:
            return function(self, *args, **kwargs)
        finally:
            if timeout == 0:
                self.setblocking(False)
    return blocking


def relayed(method):
    """Decorator: what a socket does whose datagrams go through a relay; any other is stock."""
    stock = getattr(_orig_socket, method.__name__, None)

    @functools.wraps(method)
    def either(self, *args, **kwargs):
        if self._is_datagram and self._use_relay():
            return method(self, *args, **kwargs)
        return stock(self, *args, **kwargs)
    del either.__wrapped__              # stock's parameters have no names
    return either


class _Descriptor(_orig_socket):
    """The part of `socksocket` that is about its descriptor."""

    def _check_open(self):
        if self.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    @contextlib.contextmanager
    def _bare(self):
        """This socket as a non-blocking stock one, whatever subclasses make of its methods."""
        timeout = self.gettimeout()
        self._check_open()
        # A duplicate, because another thread may close this one, and its number be used anew.
        with _orig_socket(self.family, self.type, self.proto, socket.dup(self.fileno())) as sock:
            sock.setblocking(False)
            try:
                yield sock
            finally:
                super().settimeout(timeout)

    def _replace(self, sock):
        """Have the descriptor of `sock` instead, by the old number where the system lets us."""
        timeout, fd, family, kind, proto = (self.gettimeout(), self.detach(), sock.family,
                                            sock.type, sock.proto)
        other = sock.detach()
        if os.name == 'posix':
            os.dup2(other, fd, inheritable=False)
            os.close(other)
        else:
            socket.close(fd)
            fd = other
        _orig_socket.__init__(self, family, kind, proto, fd)
        self.settimeout(timeout)


class _BaseSocket(_Descriptor):
    """The part of `socksocket` that is for datagrams: with a proxy, they go through its relay.

    The relay is asked for by bind(), connect() or the first datagram (RFC 1928 section 7).
    """
    _is_datagram = False                # UDP over IPv4 or IPv6
    _bypass = ''                        # what to reach without the proxy
    proxy_peername = None               # (host, port) of the destination
    proxy_sockname = None               # (host, port) that it sees, as far as the proxy says
    ssl_context = None                  # for proxies inside of TLS; None: a usual one
    _proxyconn = None                   # TCP connection that keeps the relay alive
    _context = None                     # `GssContext` that protects datagrams
    _relay = None                       # where it is, if other hosts may send directly
    _peeked = None, b''                 # one that stays, and what it protects

    def _use_relay(self, dest_pair=None):
        """Whether there is a relay for datagrams to `dest_pair`; asks for one if there is not."""
        self._check_open()
        if (self._bypass and dest_pair or not self._proxyconn) and not self._chain(dest_pair):
            return False
        if not self._proxyconn and not dest_pair and self._bypass and self.getsockname()[1]:
            return False                # what was sent so far went directly
        with self._associating:
            if self._proxyconn:
                self._check_relay()
            else:
                if self._is_direct():   # the system would let no answer of the relay through
                    raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
                if not self.getsockname()[1]:
                    super().bind(('::' if self.family == socket.AF_INET6 else '', 0))
                self._associate()
        return True

    def _is_direct(self):
        """Whether the socket is connected."""
        with contextlib.suppress(OSError):
            return bool(super().getpeername())
        return False

    def _check_relay(self):
        """Raise GeneralProxyError if the proxy has ended the association."""
        try:
            ended = not self._proxyconn.recv(4096)
        except BLOCKED:
            return
        except OSError:
            ended = True
        if ended:
            raise GeneralProxyError('The proxy ended the UDP association')

    def _deadline(self):
        """For a setup: the socket's timeout, and some for one that does not block."""
        timeout = self.gettimeout()
        return after(SETUP_TIMEOUT if timeout == 0 else timeout)

    def _associate(self):
        """Have the proxy relay what this bound socket sends and receives."""
        chain = self._chain()
        if len(chain) > 1 or chain[0].type & ~LAYERS != SOCKS5:
            raise OSError(errno.EOPNOTSUPP, 'UDP only supported by one proxy of type SOCKS5')
        ours = Address('0.0.0.0', self.getsockname()[1])        # the host may be another there
        control, relay = run(reach(chain, ours, self._deadline(), (), self.ssl_context,
                                   Command.UDP_ASSOCIATE))
        try:
            if (family_of(relay.host), self.family) == (socket.AF_INET, socket.AF_INET6):
                relay = Address('::ffff:' + relay.host, relay.port)
            elif family_of(relay.host) != self.family:
                self._replace(bound(Address('::', ours.port), socket.SOCK_DGRAM))
                self._bypass = ''       # to hosts of the other family there is no other way now
            if self._bypass:
                self._relay = relay
            else:                       # the system keeps strangers away
                super().connect(relay)
        except BaseException:
            control.close()
            raise
        self._proxyconn, self._context = control, getattr(control, 'context', None)
        self.proxy_sockname = tuple(UNSPECIFIED)

    def _receive(self, size, flags=0):
        """The payload of the next datagram, its sender, and whether it was longer than `size`."""
        until = after(self.gettimeout())
        waits = self.gettimeout() != 0 and not flags & getattr(socket, 'MSG_DONTWAIT', 0)
        while True:
            while waits and self not in poll([self, self._proxyconn], (), until):
                self._check_relay()
                if until and time.monotonic() >= until:
                    raise socket.timeout('timed out')
            data, source = super().recvfrom(1 << 16, flags)
            if not source or self._relay and source[:2] != self._relay:     # none: shut down
                return data[:size], source, len(data) > size
            data = self._opened(data, flags & socket.MSG_PEEK) if self._context else data
            with contextlib.suppress(EOFError, ProtocolError):
                datagram = Datagram.unpack(data)
                if not datagram.fragment and self._is_from_peer(datagram.address):
                    payload = datagram.payload
                    return payload[:size], self._name(datagram.address), len(payload) > size
            if flags & socket.MSG_PEEK:
                super().recv(1)         # else it would come again

    def _opened(self, message, stays):
        """What a datagram protects; one that stays will come again, and is no replay then."""
        data = (self._peeked[1] if message == self._peeked[0]
                else opened(self._context, message))
        self._peeked = (message, data) if stays else (None, b'')
        return data

    def _is_from_peer(self, address):
        """Whether connect() lets it in; of a name that the proxy resolved only the port counts."""
        host, port = (self.proxy_peername or ('', 0))[:2]
        return port in (0, address.port) and plain_ip(host) in (None, plain_ip(address.host))

    def _name(self, address):
        """The tuple that a socket of this family calls `address`."""
        if self.family != socket.AF_INET6:
            return tuple(address)
        host = address.host
        is_ipv4 = len(ip_bytes(host) or b'') == 4       # else it may be a name
        return '::ffff:' + host if is_ipv4 else host, address.port, 0, 0

    def _send_to_relay(self, message, flags):
        if self._relay:
            return super().sendto(message, flags, self._relay)
        return super().send(message, flags)

    def _transmit(self, data, flags, dest_pair):
        if dest_pair is None:
            raise OSError(errno.EDESTADDRREQ, 'Destination address required')
        chain = self._chain()
        address = destination(dest_pair, chain)
        if not chain[-1].rdns and ip_bytes(address.host) is None:
            address = run(resolve(canonical(address)))[0]
        header = Datagram(address, b'').pack()
        whole = b''.join((header, data))
        if self._context:
            self._send_to_relay(self._context.seal(whole), flags)
            return len(data)
        return max(0, self._send_to_relay(whole, flags) - len(header))

    def sendto(self, *args, **kwargs):
        """As in stock, up to 65,497 bytes to an IPv4 address, less to others and with GSSAPI."""
        if self._is_datagram and len(args) > 1 and self._use_relay(args[-1]):
            return self._transmit(args[0], args[1] if len(args) > 2 else 0, args[-1])
        return super().sendto(*args, **kwargs)

    @relayed
    def send(self, bytes, flags=0):
        return self._transmit(bytes, flags, self.proxy_peername)

    @relayed
    def sendall(self, bytes, flags=0):
        self._transmit(bytes, flags, self.proxy_peername)

    def sendmsg(self, *args):
        address = args[3] if len(args) > 3 else None
        if self._is_datagram and self._use_relay(address):
            return self._transmit(b''.join(args[0]), args[2] if len(args) > 2 else 0,
                                  address or self.proxy_peername)
        return super().sendmsg(*args)

    @relayed
    def recv(self, bufsize, flags=0):
        return self._receive(bufsize, flags)[0]

    @relayed
    def recvfrom(self, bufsize, flags=0):
        return self._receive(bufsize, flags)[:2]

    @relayed
    def recv_into(self, buffer, nbytes=0, flags=0):
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    @relayed
    def recvfrom_into(self, buffer, nbytes=0, flags=0):
        view = memoryview(buffer).cast('B')
        payload, sender, _ = self._receive(nbytes or len(view), flags)
        view[:len(payload)] = payload
        return len(payload), sender

    @relayed
    def recvmsg(self, bufsize, ancbufsize=0, flags=0):
        payload, sender, longer = self._receive(bufsize, flags)
        return payload, [], socket.MSG_TRUNC if longer else 0, sender

    @relayed
    def recvmsg_into(self, buffers, ancbufsize=0, flags=0):
        views = [memoryview(buffer).cast('B') for buffer in buffers]
        payload, sender, longer = self._receive(sum(map(len, views)), flags)
        stream = io.BytesIO(payload)
        for view in views:
            stream.readinto(view)
        return len(payload), [], socket.MSG_TRUNC if longer else 0, sender

    def _leave_relay(self):
        if self._proxyconn:
            self._proxyconn.close()
            self._proxyconn = self._relay = self._context = self.proxy_peername = None


class socksocket(_BaseSocket):
    """A socket that connects through a proxy, if it has one; else a stock socket.

    The arguments are those of socket.socket.  `proxy` is a URL, or a list of them: a chain, first
    hop first; or None: the default proxy.

    A proxy carries TCP and UDP over IPv4 and IPv6; sockets of all other kinds are stock ones.
    A connect() that fails closes the socket.  It blocks even if the socket does not, for a minute
    at most.
    """
    default_proxy = None
    default_bypass = ''

    def __init__(self, family=STOCK[0], type=STOCK[1], proto=STOCK[2], fileno=None, *, proxy=None):
        default, bypass = _default(self.__class__) if proxy is None else (arguments(proxy), '')
        super().__init__(family, type, proto, fileno)
        kind = self.type & 0xF          # before Python 3.7 there are flags in it
        if (self.family in (socket.AF_INET, socket.AF_INET6)
                and self.proto in (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)):
            self._is_datagram = kind == socket.SOCK_DGRAM
            self._is_proxied = kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        if self._is_datagram:
            self._associating = threading.Lock()
        self.proxy = default or NO_PROXY
        self._bypass = bypass

    _is_proxied = False                 # TCP or UDP, over IPv4 or IPv6
    _options = None                     # of setsockopt(), for another descriptor
    _proxy_address = None

    def set_proxy(self, proxy_type=None, addr=None, port=None, rdns=True, username=None,
                  password=None):
        """Set the proxy for the next connect(); without arguments, none.

        proxy_type          SOCKS4, SOCKS5 or HTTP; or a URL, or a list of URLs for a chain; then
                            the others are not used
        addr, port          where it is; by default port 1080, of an HTTP proxy 8080
        rdns                whether it resolves names
        username, password  str or bytes; SOCKS4 has only the first

        Raises ValueError or GeneralProxyError for what cannot be.
        """
        self.proxy = arguments(proxy_type, addr, port, rdns, username, password)
        self._bypass = ''

    def setproxy(self, *args, **kwargs):
        """set_proxy(), also with `proxytype` for `proxy_type`."""
        if 'proxytype' in kwargs:
            kwargs['proxy_type'] = kwargs.pop('proxytype')
        return self.set_proxy(*args, **kwargs)

    def _chain(self, dest_pair=None):
        """The proxies on the way to `dest_pair`, first hop first; none: like a stock socket."""
        if not self._is_proxied or not self.proxy[0]:
            return []
        if dest_pair and self._bypass:
            host = dest_pair[0]
            if is_bypassed(name_text(host) if isinstance(host, bytes) else str(host), self._bypass):
                return []
        return hops(tuple(self.proxy))

    def setsockopt(self, *args):
        super().setsockopt(*args)
        if self._is_proxied and not self.proxy_peername:
            self._options = self._options or {}
            self._options[args[:2]] = args

    def bind(self, *address):
        """As in stock; a UDP socket with a proxy gets its relay now."""
        super().bind(*address)
        if self._is_datagram:
            self._use_relay()

    def connect(self, dest_pair, catch_errors=None):
        """Connect to `dest_pair`, (host, port), through the proxy, if there is one.

        Raises ProxyConnectionError if the proxy cannot be reached, and SOCKS5AuthError,
        SOCKS5Error, SOCKS4Error, HTTPError or another GeneralProxyError for what goes wrong there;
        with `catch_errors`, the cause of it instead.
        """
        chain = self._chain(dest_pair)
        if not chain:
            self._leave_relay()
            return super().connect(dest_pair)
        if self._is_datagram:
            return self._connect_datagrams(dest_pair, chain)
        if self.proxy_peername:
            raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
        try:
            self._connect_through(dest_pair, chain)
        except BaseException as error:
            self.close()
            if catch_errors and isinstance(error, ProxyError) and error.socket_err:
                raise error.socket_err
            raise

    def connect_ex(self, dest_pair):
        """connect(), but return an errno, 0 for success; unknown names are still raised."""
        if not self._chain(dest_pair):
            self._leave_relay()
            return super().connect_ex(dest_pair)
        try:
            socksocket.connect(self, dest_pair)         # whatever a subclass makes of that
        except OSError as error:
            cause = getattr(error, 'socket_err', error)
            if isinstance(cause, socket.timeout):
                return errno.EAGAIN     # as in stock
            if isinstance(cause, socket.gaierror) or not system_errno(error):
                raise
            return error.errno
        return 0

    def _connect_datagrams(self, dest_pair, chain):
        """Send to `dest_pair`, and receive from there only; from all if that is 0.0.0.0, 0."""
        address = destination(dest_pair, chain)
        self._use_relay(dest_pair)
        if self._relay:
            super().connect(self._relay)
            self._relay = None          # now everything comes from there
        if not chain[-1].rdns:
            address = run(resolve(canonical(address)))[0]
        anybody = address.host in ('0.0.0.0', '::') and not address.port
        self.proxy_peername = None if anybody else tuple(address)

    def _connect_through(self, dest_pair, chain, sockaddr=None):
        """connect() by way of the chain, whose first proxy is at `sockaddr`, if that is known."""
        destination(dest_pair, chain)   # before anything is sent
        until = self._deadline()
        with connecting(chain[0]):
            self._connect_first(chain[0], sockaddr, until)
        self._negotiate(dest_pair, chain, until)

    def _negotiate(self, dest_pair, chain, until):
        """The rest of connect(), when this socket is connected to the first proxy."""
        with self._bare() as sock:
            last, bnd = run(through(sock, chain, Command.CONNECT, destination(dest_pair, chain),
                                    until, self.ssl_context))
            if last is not sock:        # before this one's mode is what TLS over it has
                self._replace(last)
        self.proxy_sockname, self.proxy_peername = tuple(bnd), tuple(dest_pair)

    def _connect_first(self, proxy, sockaddr, until):
        """Connect to the first proxy, with another descriptor if it needs another family."""
        if proxy.is_path:
            family, sockaddr = socket.AF_UNIX, proxy.addr
        elif sockaddr:
            family = self.family
        else:
            found = look_up(proxy.addr, proxy.sure_port)
            family, *_, sockaddr = min(found, key=lambda info: info[0] != self.family)
        if (family, self.family) == (socket.AF_INET, socket.AF_INET6):
            sockaddr = '::ffff:' + sockaddr[0], sockaddr[1]
        elif family != self.family:
            self._replace(_orig_socket(family, socket.SOCK_STREAM))
            for option in (self._options or {}).values():
                with contextlib.suppress(OSError):
                    super().setsockopt(*option)
        with self._bare() as sock:
            run(await_connect(sock, sockaddr, until))
        self._proxy_address = sockaddr

    def dup(self):
        """As in stock; what goes through a relay goes on so."""
        other = super().dup()
        for name in ('proxy', '_bypass', 'ssl_context', 'proxy_peername', 'proxy_sockname',
                     '_context', '_relay'):
            setattr(other, name, getattr(self, name))
        if self._proxyconn:
            other._proxyconn = self._proxyconn.dup()
        return other

    def close(self):
        if self._proxyconn:
            self._proxyconn.close()
        super().close()

    def get_proxy_sockname(self):
        """(host, port) of the proxy's own side of the connection, as far as it says."""
        return self.proxy_sockname

    getproxysockname = get_proxy_sockname

    def get_proxy_peername(self):
        """The address of the proxy; None without one."""
        return self._proxyconn.getpeername() if self._proxyconn else self._proxy_address

    getproxypeername = get_proxy_peername

    def get_peername(self):
        """The destination, as it was given to connect(); without a proxy as in stock."""
        address = super().getpeername()
        if self._proxyconn and not self.proxy_peername:         # connected to the relay only
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self.proxy_peername or address

    getpeername = get_peername

    # There are subclasses that connect to the proxy in a way of their own, and then call these.

    def _negotiate_SOCKS5(self, *dest_addr):
        self._negotiate(dest_addr, hops(tuple(self.proxy)), self._deadline())

    _negotiate_SOCKS4 = _negotiate_HTTP = _negotiate_SOCKS5

    def _proxy_addr(self):
        proxy, *_ = hops(tuple(self.proxy))
        return proxy.addr, proxy.sure_port


def create_connection(dest_pair: Tuple[str, int], timeout=None, source_address=None,
                      proxy_type=None, proxy_addr: Optional[str] = None,
                      proxy_port: Optional[int] = None, proxy_rdns: bool = True,
                      proxy_username=None, proxy_password=None, socket_options=None, *,
                      proxy=None, ssl_context=None) -> socksocket:
    """A socksocket that is connected to `dest_pair`, (host, port), through a proxy.

    timeout           seconds for each address that is tried, and of the socket afterwards
    source_address    (host, port) to connect from
    proxy_type, ...   as in socksocket.set_proxy()
    socket_options    arguments of setsockopt(), set before it connects
    proxy             instead of these: a URL, or a list of URLs for a chain, empty for no proxy
    ssl_context       for proxies inside of TLS

    Without a proxy, the default one is used, if there is one.  Tries all addresses of the proxy,
    or of the destination if there is none.  Raises as socksocket.connect() does.
    """
    if proxy is None and (proxy_type is not None or proxy_addr is not None):
        proxy = arguments(proxy_type or 0, proxy_addr, proxy_port, proxy_rdns, proxy_username,
                          proxy_password)
    host = name_text(dest_pair[0]) if isinstance(dest_pair[0], bytes) else dest_pair[0]
    dest_pair = (host.strip('[]') if host.startswith('[') else host, *dest_pair[1:])
    chain = chosen(proxy, dest_pair[0])
    error = OSError('getaddrinfo() gave no address')
    for family, kind, proto, _, sockaddr in first_addresses(chain, dest_pair):
        sock = socksocket(family, kind, proto, proxy=chain)
        sock.ssl_context = ssl_context
        try:
            for option in socket_options or ():
                sock.setsockopt(*option)
            if isinstance(timeout, (int, float)):
                sock.settimeout(timeout)
            if source_address:
                sock.bind(source_address)
            if chain:
                sock._connect_through(dest_pair, chain, sockaddr)
            else:
                sock.connect(sockaddr)
            return sock
        except BaseException as caught:
            sock.close()
            # Another address of the proxy makes no difference to what it says.
            if isinstance(caught, GeneralProxyError) or not isinstance(caught, OSError):
                raise
            error = caught
    try:
        raise error
    finally:
        error = None                    # it has this frame, which has it


def chosen(proxy, host=None):
    """The chain that is meant by an argument `proxy`; the default one if it is None."""
    if proxy is not None:
        return hops(proxy)
    default, bypass = _default()
    return [] if host and is_bypassed(host, bypass) else hops(default)


def first_addresses(chain, dest_pair):
    """What getaddrinfo() gives for the first proxy; or for the destination, without one."""
    if not chain:
        return socket.getaddrinfo(*dest_pair[:2], 0, socket.SOCK_STREAM)
    if chain[0].is_path:
        return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, '', chain[0].addr)]
    with connecting(chain[0]):
        return look_up(chain[0].addr, chain[0].sure_port)


class _ServerSocket(socksocket):
    """A connection to a proxy that waits there for another one (BIND, RFC 1928 section 4)."""
    _unpack = None                      # for the second reply
    _begun = b''                        # of it

    def getsockname(self):
        """(host, port) where the proxy waits."""
        return self.proxy_sockname

    def accept(self):
        """(socket, its peer's address), when there is one; this socket has served then.

        Raises SOCKS5Error or SOCKS4Error if the proxy gave up, socket.timeout as in stock.
        """
        timeout = self.gettimeout()
        with negotiating(), self._bare() as sock:
            stream = ExactStream(sock, time.monotonic() if timeout == 0 else after(timeout))
            stream.surplus = self._begun
            try:
                address = run(stream.read(self._unpack))
            except socket.timeout:
                address, self._begun = None, stream.surplus
        if not address:
            raise socket.timeout('timed out') if timeout else BlockingIOError(
                errno.EAGAIN, os.strerror(errno.EAGAIN))
        peer = socksocket(self.family, self.type, self.proto, self.detach(), proxy=[])
        peer.settimeout(socket.getdefaulttimeout())
        peer.proxy_sockname, peer.proxy_peername = self.proxy_sockname, tuple(address)
        return peer, tuple(address)


def create_server(address=('', 0), *, proxy=None, timeout: Optional[float] = None,
                  ssl_context=None) -> socksocket:
    """A socket for one connection that somebody makes to the proxy (BIND, RFC 1928 section 4).

    address   (host, port) of who is expected; an empty host for anybody, if the proxy allows that
    proxy     as in create_connection()
    timeout   seconds for the proxy's answer, and of the socket afterwards

    Its getsockname() is where to connect to; its accept() gives (socket, address), once.  Raises as
    socksocket.connect() does.
    """
    chain = chosen(proxy)
    if not chain:
        raise GeneralProxyError('No proxy specified')
    expected = destination((address[0] or UNSPECIFIED.host, address[1]), chain)
    near, bnd = run(reach(chain, expected, after(timeout), (), ssl_context, Command.BIND))
    sock = _ServerSocket(near.family, near.type, near.proto, near.detach(), proxy=[])
    sock.settimeout(timeout)
    sock._unpack = unpack_answer4 if chain[-1].type & ~LAYERS == SOCKS4 else unpack_answer5
    sock.proxy_sockname = tuple(bnd)
    return sock


async def open_connection(host: str, port: int, *, proxy=None, ssl_context=None,
                          timeout: Optional[float] = SETUP_TIMEOUT, **options):
    """asyncio.open_connection() through a proxy: (reader, writer).

    proxy, ssl_context    as in create_connection()
    timeout               seconds until it is connected
    options               of asyncio.open_connection(): ssl, server_hostname, limit
    """
    import asyncio
    chain = chosen(proxy, host)
    until = after(timeout)
    if not chain:
        return await within(until, asyncio.open_connection(host, port, **options))
    address = destination((host, port), chain)
    sock, _ = await drive(reach(chain, address, until, (), ssl_context))
    if options.get('ssl'):
        options.setdefault('server_hostname', host)
    try:
        return await within(until, asyncio.open_connection(sock=sock, **options))
    except BaseException:
        sock.close()
        raise


async def within(until, awaitable):
    """What it gives; socket.timeout after `until`."""
    import asyncio
    try:
        return await asyncio.wait_for(awaitable, until and max(0, until - time.monotonic()))
    except asyncio.TimeoutError:
        raise socket.timeout('timed out') from None


async def drive(conversation):
    """run() in an asyncio task."""
    advance, value = conversation.send, None
    while True:
        try:
            wish = advance(value)
        except StopIteration as stop:
            return stop.value
        try:
            value = await fulfil(wish)
            advance = conversation.send
        except BaseException as error:          # CancelledError too: it ends the conversation
            advance, value = conversation.throw, error


async def fulfil(wish):
    """What a conversation asks for."""
    import asyncio
    loop = asyncio.get_event_loop()
    if isinstance(wish, Call):
        return await within(wish.until, loop.run_in_executor(None, wish.function))
    found, watched = loop.create_future(), []

    def tell(sock):
        if not found.done():
            found.set_result([sock])

    try:
        for sockets, watch, unwatch in ((wish.reading, loop.add_reader, loop.remove_reader),
                                        (wish.writing, loop.add_writer, loop.remove_writer)):
            for sock in sockets:
                watch(sock, tell, sock)
                watched.append((unwatch, sock))
        return await within(wish.until, found)
    except socket.timeout:
        return []
    except NotImplementedError:         # Windows' usual loop
        return await loop.run_in_executor(None, poll, *wish)
    finally:
        for unwatch, sock in watched:
            unwatch(sock)


# -------------------------------------------------------------------------------------- operation
#
# A server as a process: what its supervisor, its administrator and the system say to it.

LONG_LIFE = 5.0                         # seconds; a worker that lived less is not restarted at once
BACK_OFF = 10.0                         # seconds at most until it is


def tls_context(certificate, key=None, client_ca=None):
    """The ssl.SSLContext of a server with the certificate (chain) in a file, and its key there or
    in another; with `client_ca` clients must show one that is signed by it.  FileError says which
    file is wrong."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if hasattr(context, 'minimum_version'):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:                               # Python 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    try:
        name = key or certificate
        context.load_cert_chain(certificate, key)
        if client_ca:
            name = client_ca
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        wanted = 'certificates' if name == client_ca else 'a certificate and its key'
        raise FileError(f'{name}: expected {wanted}, as PEM: {reason(error)}') from None
    except OSError as error:
        raise FileError(f'{name}: {reason(error)}') from None
    return context


def activated_sockets(environ):
    """The listening sockets that systemd hands over (sd_listen_fds(3)); they are taken from
    `environ`."""
    ours = environ.pop('LISTEN_PID', '') == str(os.getpid())
    count = int(environ.pop('LISTEN_FDS', 0)) if ours else 0
    sockets = []
    for number in range(3, 3 + count):
        os.set_inheritable(number, False)
        family = kind = None            # Python 3.6 does not ask the socket
        with contextlib.suppress(OSError), _orig_socket(fileno=os.dup(number)) as probe:
            family = probe.getsockopt(socket.SOL_SOCKET, getattr(socket, 'SO_DOMAIN', 39))
            kind = probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
        if family not in families or kind != socket.SOCK_STREAM:
            raise ValueError(f'descriptor {number} of LISTEN_FDS: expected a TCP socket, or a unix '
                             f'one with connections')
        sock = _orig_socket(family, kind, 0, number)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sockets.append(sock)
    return sockets


class Notifier:
    """Tells systemd how the service is (sd_notify(3)); without systemd, nobody."""
    client = due = None                 # as an item of a loop, for the watchdog

    def __init__(self, environ):
        path = environ.pop('NOTIFY_SOCKET', '')
        self._path = '\0' + path[1:] if path.startswith('@') else path
        mine = environ.pop('WATCHDOG_PID', str(os.getpid())) == str(os.getpid())
        self.interval = int(environ.pop('WATCHDOG_USEC', 0)) / 2e6 if mine else 0      # seconds

    def tell(self, *words):
        if self._path:
            with contextlib.suppress(OSError), _orig_socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto('\n'.join(words).encode(), self._path)

    def tell_reloading(self):
        self.tell('RELOADING=1', f'MONOTONIC_USEC={int(time.monotonic() * 1e6)}')

    def watch(self, loop):
        """Tell it regularly that the loop is alive, if that is asked for."""
        self._loop = loop
        if self.interval:
            self.expire()

    def expire(self):
        self.tell('WATCHDOG=1')
        self._loop.timers.set(self, time.monotonic() + self.interval)


class Lifeline:
    """As an item of a loop: has a server stop when the process at the other end is gone."""
    client = due = None

    def __init__(self, server, fd):
        self._server = server
        self.fileno = lambda: fd
        server.loop.watch(self, 0, READ, self)

    def ready(self, *_):
        self._server.loop.stop()


class Service:
    """A server, until a signal ends it.

    configure   gives the `Settings` anew, or raises ValueError or OSError
    announce()  is called when all is ready
    """

    def __init__(self, server, configure, notifier, announce):
        self.server = server
        self._configure = configure
        self._notifier = notifier
        self._announce = announce
        self._stopping = False

    def run(self, lifeline=None):
        """Serve; `lifeline` is a descriptor that is readable when it is time to end."""
        handlers = {'SIGINT': self.stop, 'SIGTERM': self.stop, 'SIGHUP': self.reload,
                    'SIGUSR1': self.show}
        with self.server:
            for name, handler in handlers.items():
                if hasattr(signal, name):       # Windows has but two
                    signal.signal(getattr(signal, name), handler)
            # A signal that comes just before select() would be seen only after it.
            signal.set_wakeup_fd(self.server.loop.waker.wakeup_fd())
            if hasattr(signal, 'pthread_sigmask'):          # a supervisor has blocked them
                signal.pthread_sigmask(signal.SIG_SETMASK, [])
            if lifeline is not None:
                Lifeline(self.server, lifeline)
            self._notifier.watch(self.server.loop)
            self._notifier.tell('READY=1')
            self._announce()
            self.server.serve_forever()
            self._notifier.tell('STOPPING=1')
            signal.set_wakeup_fd(-1)

    def stop(self, number, _):
        seconds = self.server.settings.drain_timeout
        if self._stopping or number == signal.SIGINT or not seconds:
            return self.server.shutdown()
        self._stopping = True
        self._notifier.tell('STOPPING=1')
        self.server.drain(seconds)

    def reload(self, *_):
        self.server.loop.call(self.server, self._reload)

    def _reload(self):
        self._notifier.tell_reloading()
        reopen_log()
        try:
            self.server.reconfigure(self._configure())
            log.info('reloaded')
        except (ValueError, OSError) as error:
            log.error('not reloaded, the old settings stay: %s', error)
        self._notifier.tell('READY=1')

    def show(self, *_):
        self.server.loop.call(self.server, self._show)

    def _show(self):
        print(table(self.server), file=sys.stderr, flush=True)


def table(server):
    """All that is served now, a line each, and what was before."""
    items = [item for loop in server.loops() for item in list(loop.items) if item.client]
    lines = [item.client.line('', *item.traffic) for item in items if item.client]
    rows = [('client', 'user', 'protocol', 'command', 'target', 'up', 'down', 'seconds')]
    rows += [(*map(str, line[:5]), str(line.up), str(line.down), f'{line.seconds:.0f}')
             for line in sorted(lines, key=lambda line: -line.seconds)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    roster = server.roster
    return '\n'.join([f'process {os.getpid()}: {len(lines)} clients now, {roster.ended} before, '
                      f'with {roster.up} bytes up and {roster.down} down'] + [
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows])


class Supervisor:
    """Several processes that serve on the same sockets, each with a loop of its own; one that dies
    is replaced.

    The arguments are those of `Service`; the sockets are those of `server`.
    """

    def __init__(self, size, server, configure, notifier, announce):
        self._size = size
        self._listeners = [sock.dup() for sock in server.listeners]
        self._socket_files, server.socket_files = server.socket_files, []
        self._settings = server.settings
        self._configure = configure
        self._notifier = notifier
        self._announce = announce
        server.server_close()
        self._started = {}              # by pid: when
        self._due = 0.0                 # when the next one may be started
        self._pause = 0.1               # seconds until one that died early is replaced
        self._stopping = False
        # Its other end closes when this process dies, however that happens.
        self._lifeline, self._held = os.pipe()
        self._signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1,
                         signal.SIGCHLD, signal.SIGALRM]

    def run(self):
        """Until a signal ends it.

        The signals are blocked, and taken when it is their turn, so that nothing interrupts us.
        """
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # who started us may have ignored it
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._start_missing()
        self._notifier.tell('READY=1')
        self._announce()
        while self._started or not self._stopping:
            self._notifier.tell('WATCHDOG=1')
            missing = len(self._started) < self._size and not self._stopping
            pauses = [max(0.001, self._due - time.monotonic())] if missing else []
            pauses += [self._notifier.interval] if self._notifier.interval else []
            signal.setitimer(signal.ITIMER_REAL, min(pauses, default=0))
            self._take(signal.sigwait(self._signals))
            self._reap()
            self._start_missing()
        remove_files(self._socket_files)
        self._notifier.tell('STOPPING=1')

    def _take(self, number):
        if number in (signal.SIGINT, signal.SIGTERM):
            self._stopping = True
            for sock in self._listeners:
                sock.close()
        elif number == signal.SIGHUP:
            # For workers to come; those that there are say what is wrong with the new settings.
            reopen_log()
            with contextlib.suppress(ValueError, OSError):
                self._settings = self._configure()
        if number not in (signal.SIGCHLD, signal.SIGALRM):
            for pid in self._started:
                os.kill(pid, number)    # it is not reaped yet, so this is still its number

    def _reap(self):
        for pid, started in list(self._started.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._started[pid]
                now = time.monotonic()
                if not self._stopping:
                    log.error('worker %d ended with status %#x', pid, status)
                if now - started < LONG_LIFE:
                    self._due = now + self._pause
                    self._pause = min(BACK_OFF, 2 * self._pause)
                else:
                    self._pause = 0.1

    def _start_missing(self):
        while len(self._started) < self._size and not self._stopping:
            if time.monotonic() < self._due:
                return
            pid = os.fork()
            if not pid:
                self._be_worker()
            self._started[pid] = time.monotonic()

    def _be_worker(self):
        status = 1
        try:
            os.close(self._held)
            settings = self._settings
            if settings.max_clients:
                settings = settings._replace(max_clients=-(-settings.max_clients // self._size))
            server = Server((), settings, listeners=self._listeners)
            Service(server, self._configure, Notifier({}), lambda: None).run(self._lifeline)
            status = 0
        except Exception:
            log.exception('this is a bug')
        finally:
            logging.shutdown()
            os._exit(status)


class LogFile(logging.FileHandler):
    """A file to append to; that it cannot be written to, for a time, is no reason to stop."""
    is_moved = False                    # so the next line begins a new one

    def emit(self, record):
        try:
            if self.is_moved:
                old, self.stream = self.stream, self._open()
                self.is_moved = False
                old.close()
        except OSError:
            self.handleError(record)
        super().emit(record)

    def handleError(self, record):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif sys.stderr:
            with contextlib.suppress(OSError):
                print(f'socks.py: {self.baseFilename}: {reason(error)}: {self.format(record)}',
                      file=sys.stderr, flush=True)


def reopen_log():
    """Go on in a new file, in case that the log's was moved away."""
    for handler in logging.getLogger().handlers:
        handler.is_moved = True         # means something to a `LogFile`


class TextFormatter(logging.Formatter):
    """A record as one line of text: time, unless whoever reads it has one, level, message."""

    def __init__(self, has_time):
        super().__init__()
        self._has_time = has_time
        self._second = self._text = None

    def formatMessage(self, record):
        line = f'{record.levelname} {record.message}'
        if not self._has_time:
            return line
        second = int(record.created)
        if second != self._second:              # its text is made once
            self._second = second
            self._text = time.strftime(self.default_time_format, time.localtime(second))
        return '%s,%03d %s' % (self._text, record.msecs, line)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; a client's `Line` with its fields."""

    def format(self, record):
        import json
        entry = {'time': round(record.created, 3), 'level': record.levelname}
        if isinstance(record.msg, Line):
            entry.update(record.msg._asdict(), client=str(record.msg.client),
                         seconds=round(record.msg.seconds, 3))
        else:
            entry['message'] = record.getMessage()
        if record.exc_info:
            entry['traceback'] = self.formatException(record.exc_info)
        return json.dumps(entry)


# ----------------------------------------------------------------------------------- command line

EPILOG = """\
examples:
  socks.py                              serve this machine's programs on 127.0.0.1:1080
  socks.py -p 0                         take a free port and print it
  SOCKS_USERS=bob:secret socks.py -b 0.0.0.0
                                        serve bob, from everywhere
  curl -x socks5h://127.0.0.1:1080 http://example.org/
  ssh -o 'ProxyCommand=socks.py -x socks5h://proxy:1080 --connect %h:%p' host
  socks.py -x socks5h://proxy:1080 --run fetch.py http://example.org/

environment:
  SOCKS_USERS                           NAME:PASSWORD pairs, separated by white space
  ALL_PROXY, NO_PROXY                   for a client: -x where none is given, and what to reach
                                        without it

signals:
  TERM                                  stop, after --drain; a second one, or INT: at once
  HUP                                   read users, rules and certificates anew; new log file
  USR1                                  print whom we serve

exit status:
  0 stopped by a signal, 1 cannot start, 2 wrong usage; of --run, that of the program
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


def where_to_listen(text):
    """argparse type: that, or (unix:PATH, None)."""
    if not text.startswith('unix:'):
        return host_and_port(text)
    if text == 'unix:' or not hasattr(socket, 'AF_UNIX'):
        raise argparse.ArgumentTypeError(f'{text!r}: expected unix:PATH, where there are unix '
                                         f'sockets')
    return text, None


def permissions(text):
    """argparse type: the number that octal digits mean."""
    if not re.match('0?[0-7]{3}$', text):
        raise argparse.ArgumentTypeError(f'{text!r}: expected three octal digits, 660 for example')
    return int(text, 8)


def name_and_password(text):
    """argparse type: both bytes, of NAME:PASSWORD."""
    name, _, password = os.fsencode(text).partition(b':')
    if not (0 < len(name) < 256 and 0 < len(password) < 256):
        raise argparse.ArgumentTypeError('expected NAME:PASSWORD, of 1 to 255 bytes each')
    return name, password


def gssapi_levels(text):
    """argparse type: the numbers of the levels named."""
    names = {'clear': GssContext.CLEAR, 'integrity': GssContext.INTEGRITY,
             'confidentiality': GssContext.CONFIDENTIALITY}
    words = text.split(',')
    if not set(words) <= set(names):
        raise argparse.ArgumentTypeError(f'{text!r}: expected some of {", ".join(names)}')
    return tuple(names[word] for word in words)


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


def network(text):
    """argparse type: an ip_network."""
    try:
        return parse_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{error}, expected 192.0.2.0/24 for example') from None


def workers(text):
    """argparse type: a number of processes."""
    number = os.cpu_count() or 1
    if text != 'auto':
        number = int(text) if re.match('[0-9]+$', text) else 0
    if not 0 < number <= 1024 or number > 1 and not hasattr(os, 'fork'):
        raise argparse.ArgumentTypeError(f'{text!r}: expected auto, or a number, 1 to 1024'
                                         + ('' if hasattr(os, 'fork') else '; here only 1'))
    return number


def host_with_port(text):
    """argparse type: (host, port) of HOST:PORT."""
    host, port = host_and_port(text)
    if not port:
        raise argparse.ArgumentTypeError(f'{text!r}: expected HOST:PORT')
    return host, port


def proxy_url(text):
    """argparse type: a `Proxy`."""
    try:
        return parse_proxy_url(text)
    except (ValueError, GeneralProxyError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


DEFAULTS = Settings()

# Group, then its options: flags and what add_argument() takes.
OPTIONS = [
    ('listening', [
        (('-b', '--bind'), dict(
            metavar='ADDRESS[:PORT]', type=where_to_listen, action='append', default=[],
            help='address or name to listen on, or unix:PATH, repeatable (default: 127.0.0.1)')),
        (('-p', '--port'), dict(
            metavar='PORT', type=port_number, default=1080,
            help='port where --bind has none, 0 for a free one (default: %(default)s)')),
        (('-w', '--workers'), dict(
            metavar='N', type=workers, default=1,
            help='serve with so many processes, or auto: one for each processor '
                 '(default: %(default)s)')),
        (('--unix-mode',), dict(
            metavar='OCTAL', type=permissions,
            help='permissions of unix sockets: who may connect (default: 600, less the umask)')),
        (('--no-http',), dict(
            action='store_false', dest='http', help='serve SOCKS only (default: HTTP, too)')),
        (('--proxy-protocol',), dict(
            metavar='NETWORK', type=network, action='append', default=[], dest='balancers',
            help='expect a PROXY header from there, repeatable: load balancers'))]),
    ('TLS', [
        (('--tls-cert',), dict(
            metavar='FILE', help='certificate, and those that lead to it: clients use TLS')),
        (('--tls-key',), dict(
            metavar='FILE', help='its key (default: in the same file)')),
        (('--tls-client-ca',), dict(
            metavar='FILE', help='serve only clients with a certificate signed by this one; its '
                                 'common name is the user')),
        (('--udp-over-plain',), dict(
            action='store_true', help='allow UDP beside TLS, in the clear'))]),
    ('who may use it', [
        (('-u', '--user'), dict(
            metavar='NAME:PASSWORD', type=name_and_password, action='append', default=[],
            dest='users', help='ask for a password, repeatable; others on this machine can see it, '
                               'see SOCKS_USERS below (default: ask nobody)')),
        (('--users',), dict(
            metavar='FILE', dest='users_file',
            help='more of them, NAME:PASSWORD or NAME:HASH lines')),
        (('--hash-password',), dict(
            action='store_true', help='print the HASH of a password, read from the terminal or '
                                      'stdin, and end')),
        (('--from',), dict(
            metavar='NETWORK', type=network, action='append', default=[], dest='clients',
            help='serve only clients from there, repeatable (default: from anywhere)')),
        (('--trust',), dict(
            metavar='NETWORK', type=network, action='append', default=[], dest='trusted',
            help='ask clients from there for no password, repeatable')),
        (('--gssapi',), dict(
            action='store_true', dest='by_gssapi',
            help='authenticate clients by Kerberos, too; the keys are in the keytab')),
        (('--gssapi-level',), dict(
            metavar='LEVELS', type=gssapi_levels,
            help='what protection clients may choose, of clear, integrity and confidentiality '
                 '(default: integrity,confidentiality)')),
        (('--gssapi-nec',), dict(
            action='store_true', help="agree on the level without protection, as NEC's programs "
                                      'do; whoever is in between can lower it')),
        (('--keytab',), dict(
            metavar='FILE', help='keys for --gssapi (default: that in KRB5_KTNAME, or the '
                                 "system's)")),
        (('--ident',), dict(
            action='store_true', help="ask SOCKS4 clients' hosts who they are (RFC 1413), and "
                                      'refuse another userid')),
        (('--open',), dict(
            action='store_true',
            help='serve everybody: allow an address beyond loopback without users')),
        (('--max-clients',), dict(
            metavar='N', type=count, default=DEFAULTS.max_clients,
            help='serve so many at once, further ones wait '
                 '(default: as many as open files allow)')),
        (('--max-per-client',), dict(
            metavar='N', type=count, default=DEFAULTS.max_per_client,
            help='connections at once from one address (default: any number)')),
        (('--max-handshakes',), dict(
            metavar='N', type=count, default=DEFAULTS.max_handshakes,
            help='clients at once that have not yet said what they want; the oldest is closed for '
                 'one more (default: half of --max-clients, at least 64)'))]),
    ('what they may do', [
        (('--rules',), dict(
            metavar='FILE', dest='rules_file',
            help='what they may reach, see the README (default: all but what is local to the '
                 'proxy)')),
        (('--check',), dict(
            action='store_true', help='check all options and files, not addresses, and end')),
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
            ('udp', 'for an association without datagrams'))] + [
        (('--drain',), dict(
            metavar='SECONDS', type=seconds, default=DEFAULTS.drain_timeout, dest='drain_timeout',
            help='for clients to end after TERM (default: %(default)g)'))]),
    ('through other proxies', [
        (('-x', '--proxy'), dict(
            metavar='URL', type=proxy_url, action='append', default=[], dest='upstream',
            help='send CONNECT through this proxy, repeatable: a chain, first hop first; '
                 'SCHEME://[USER:PASSWORD@]HOST[:PORT], SCHEME one of socks5h, socks5, socks4a, '
                 'socks4, http, https, also with +tls, +gssapi or +unix (default: none; for '
                 'the next three, that in ALL_PROXY)')),
        (('--connect',), dict(
            metavar='HOST:PORT', type=host_with_port,
            help='do not serve: join stdin and stdout to a connection')),
        (('--resolve',), dict(
            metavar='NAME', help='do not serve: print the address of a name, or the name of an '
                                 "address, by Tor's extension")),
        (('--run',), dict(
            metavar='PROGRAM', nargs=argparse.REMAINDER,
            help='do not serve: run a Python script, or a module after -m, and its arguments, '
                 'with all its sockets sent through the proxy'))]),
    ('logging', [
        (('-v', '--verbose'), dict(action='store_true', help='log every step')),
        (('-q', '--quiet'), dict(action='store_true', help='log warnings only')),
        (('--log-file',), dict(
            metavar='FILE', help='append to a file; after it is moved, HUP begins another '
                                 '(default: stderr)')),
        (('--log-format',), dict(
            choices=('text', 'json'), default='text', help='(default: %(default)s)')),
        (('-V', '--version'), dict(action='version', version=f'socks.py {__version__}'))]),
]


def build_parser():
    """The command line; every default of a setting is the one in `Settings`."""
    parser = argparse.ArgumentParser(
        prog='socks.py', usage='%(prog)s [options]', epilog=EPILOG,
        description='A proxy for SOCKS4, SOCKS4a, SOCKS5 and HTTP.',
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
    if args.users_file:
        users.update(read_users(args.users_file))
        if not users:
            raise FileError(f'{args.users_file}: there are no users, so nobody would be asked')
    for name in ('source', 'advertise'):
        hosts = getattr(args, name)
        if len(set(map(family_of, hosts))) < len(hosts):
            raise ValueError(f'--{name}: expected one address of a family')
    fields = {name: tuple(value) if isinstance(value, list) else value
              for name, value in vars(args).items() if name in Settings._fields}
    if args.by_gssapi:
        fields['gssapi'] = args.gssapi_level or (GssContext.INTEGRITY, GssContext.CONFIDENTIALITY)
        if args.keytab:
            os.environ['KRB5_KTNAME'] = args.keytab     # the library has no other way
    elif args.keytab or args.gssapi_nec or args.gssapi_level:
        raise ValueError('--gssapi-level, --gssapi-nec, --keytab: expected --gssapi')
    rules = read_rules(args.rules_file) if args.rules_file else None
    if (args.tls_key or args.tls_client_ca or args.udp_over_plain) and not args.tls_cert:
        raise ValueError('--tls-key, --tls-client-ca, --udp-over-plain: expected --tls-cert')
    tls = tls_context(args.tls_cert, args.tls_key, args.tls_client_ca) if args.tls_cert else None
    return Settings(**dict(fields, users=MappingProxyType(users), rules=rules, tls=tls))


def raise_descriptor_limit(wanted=65536):
    """Allow this process as many open files as it may have, up to `wanted`."""
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):      # macOS may allow less than `hard`
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def set_up_logging(args, environ):
    """OSError if the log file cannot be opened."""
    if args.log_file and not args.check:
        handler = LogFile(args.log_file, encoding='utf-8')
    else:
        handler = logging.StreamHandler()
    is_journal = 'JOURNAL_STREAM' in environ and not args.log_file      # which has a time
    handler.setFormatter(JsonFormatter() if args.log_format == 'json' else
                         TextFormatter(has_time=not is_journal))
    level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler])


def environment_hops(host=None):
    """The chain that the environment has for `host`; ValueError if it is wrong."""
    try:
        return hops(proxy_from_environment(host))
    except (ValueError, GeneralProxyError) as error:
        raise ValueError(f'ALL_PROXY: {error}') from None


def client_command(args):
    """Do what --connect or --resolve asks for; the exit status."""
    spare = 0
    while spare < 3:                    # else the socket could be stdin or stdout
        spare = os.open(os.devnull, os.O_RDWR)
    os.close(spare)
    host, port = args.connect or (args.resolve, 0)
    chain = args.upstream or environment_hops(args.connect and host)
    until = after(args.connect_timeout)
    try:
        if args.resolve:
            print(shown(resolve_through(chain, host, until)))
        elif chain:
            sock, _ = run(reach(chain, destination((host, port), chain), until))
            converse(sock)
        else:
            converse(socket.create_connection((host, port), args.connect_timeout or None))
    except (BrokenPipeError, KeyboardInterrupt):        # nobody reads on, or wants to wait
        return 1
    except OSError as error:
        print(f'socks.py: {Address(host, port) if port else host}: {reason(error)}',
              file=sys.stderr)
        return 1
    return 0


def resolve_through(chain, host, until):
    """The IP address of a name, or the name of an IP address, as the last proxy finds it."""
    if not chain or chain[-1].type & ~LAYERS == HTTP:
        raise ValueError('--resolve: expected a SOCKS proxy, -x URL')
    chain = [*chain[:-1], chain[-1]._replace(rdns=True)]
    command = Command.RESOLVE if ip_bytes(host) is None else Command.RESOLVE_PTR
    sock, found = run(reach(chain, destination((host, 0), chain), until, command=command))
    sock.close()
    return found.host


def converse(sock):
    """Copy stdin to the socket and the socket to stdout, each up to its end."""
    with sock, open(1, 'wb', 0) as out:
        sock.settimeout(None)
        upward = threading.Thread(target=copy_stdin, args=(sock,), daemon=True)
        upward.start()
        for data in iter(functools.partial(sock.recv, 1 << 18), b''):
            while data:
                data = data[out.write(data):]
        out.close()
        if not os.isatty(0):            # there nobody would know that a key is waited for
            upward.join()


def copy_stdin(sock):
    with contextlib.suppress(OSError):  # the other thread meets it too
        for data in iter(functools.partial(os.read, 0, 1 << 18), b''):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def program_runner(arguments, chain):
    """A function that runs a Python script, or a module after -m, with its sockets sent through
    the proxies."""
    import runpy
    is_module = arguments[:1] == ['-m']
    program, *rest = arguments[is_module:] or ['']
    if not chain or not program:
        raise ValueError('--run: expected a proxy, -x URL, and a program')
    if not is_module and not os.path.exists(program):
        raise ValueError(f'--run: there is no {program}')
    set_default_proxy(chain, bypass=os.environ.get('no_proxy') or os.environ.get('NO_PROXY') or '')
    wrap_module(sys.modules[__name__], dns=True)
    sys.modules['socks'] = sys.modules[__name__]        # should the program import it
    sys.argv = [program, *rest]
    if is_module:
        sys.path[0] = os.getcwd()
        return functools.partial(runpy.run_module, program, run_name='__main__', alter_sys=True)
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    return functools.partial(runpy.run_path, program, run_name='__main__')


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        set_up_logging(args, os.environ)
    except OSError as error:
        print(f'socks.py: {args.log_file}: {reason(error)}', file=sys.stderr)
        return 1
    if args.hash_password:
        return print_hash()
    tasks = [task for task in (args.connect, args.resolve, args.run) if task is not None]
    if len(tasks) + args.check > 1:
        parser.error('--check, --connect, --resolve, --run: expected one of them')
    try:
        if args.run is None:
            return client_command(args) if tasks else serve(args)
        program = program_runner(args.run, args.upstream or environment_hops())
    except ValueError as error:
        parser.error(str(error))
    program()
    return 0


def print_hash():
    """Read a password, and print its hash for a file of users."""
    password = b''
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        if sys.stdin and sys.stdin.isatty():
            from getpass import getpass
            password = os.fsencode(getpass('Password: '))
        elif sys.stdin:
            password = sys.stdin.buffer.readline().rstrip(b'\r\n')
    if not 0 < len(password) < 256:
        print('socks.py: expected a password of 1 to 255 bytes', file=sys.stderr)
        return 1
    return 0 if print_at_once(Hashed.make(password)) else 1


def print_at_once(line):
    """Print a line; whether that was possible."""
    try:
        print(line, flush=True)
        return bool(sys.stdout)
    except OSError as error:
        print(f'socks.py: stdout: {reason(error)}', file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # for what Python tries again at its exit
        return False


def serve(args):
    """Serve until a signal; the exit status, or ValueError for options that contradict."""
    raise_descriptor_limit()
    # What no line of ours shows takes long to find out ("Optimization" in Python's logging HOWTO).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    configure = functools.partial(settings_from, args, dict(os.environ))
    try:
        settings = configure()
        if args.check:
            refuse_open_proxy(prepared(settings), [
                Address(host, port) for host, port in addresses_of(args) if ip_bytes(host)])
            return 0
        notifier = Notifier(os.environ)
        server = Server(addresses_of(args), settings, listeners=activated_sockets(os.environ))
    except (FileError, OSError) as error:
        print(f'socks.py: {reason(error)}', file=sys.stderr)
        return 1
    if args.users:
        log.warning('-u shows passwords to all users of this machine, SOCKS_USERS does not')
    announce = functools.partial(announce_addresses, server.addresses,
                                 0 in (port for _, port in addresses_of(args)))
    if args.workers == 1:
        Service(server, configure, notifier, announce).run()
    else:
        Supervisor(args.workers, server, configure, notifier, announce).run()
    log.info('stopped')
    return 0


def announce_addresses(addresses, to_stdout):
    for address in addresses:
        if to_stdout:
            print_at_once(f'listening on {address}')
        log.info('listening on %s', address)


def addresses_of(args):
    return [(host, args.port if port is None else port)
            for host, port in args.bind or [('127.0.0.1', None)]]


if __name__ == '__main__':
    sys.exit(main())
