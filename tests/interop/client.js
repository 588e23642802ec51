// Calls of a client on @grpc/grpc-js; without generated stubs, so that it needs nothing else.
'use strict';
const assert = require('node:assert');
const grpc = require('@grpc/grpc-js');

const [address, canary] = process.argv.slice(2);
const ALONE = 7000, TOGETHER = 12000, AT_ONCE = 100;
const MANAGER = '/mnemosynerpc.SessionManager/';
const bytes = (value) => value;

// Field 1 of a request: a text.
function textField(text) {
  const value = Buffer.from(text);
  const length = [];
  for (let left = value.length; ; left >>>= 7) {
    length.push(left > 127 ? (left & 127) | 128 : left);
    if (left <= 127) break;
  }
  return Buffer.concat([Buffer.from([0x0a, ...length]), value]);
}

function call(client, method, message, options = {}, metadata = new grpc.Metadata()) {
  const deadline = Date.now() + 20000;
  return new Promise((resolve, reject) => {
    client.makeUnaryRequest(MANAGER + method, bytes, bytes, message, metadata, { deadline, ...options },
      (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function failure(work, code) {
  const error = await work.then(() => null, (caught) => caught);
  assert(error && error.code === code, `expected the status ${code}, got ${error}`);
  return error.details;
}

function watch(client, deadline) {
  return client.makeServerStreamRequest('/grpc.health.v1.Health/Watch', bytes, bytes, Buffer.alloc(0),
    new grpc.Metadata(), { deadline });
}

async function checkKinds(client) {
  const unknown = textField(`${canary}-unknown`);
  assert.deepStrictEqual(await call(client, 'Exists', unknown), Buffer.alloc(0));
  assert.strictEqual(await failure(call(client, 'Get', unknown), grpc.status.NOT_FOUND),
    'mnemosyned: storage: session not found');
  await failure(call(client, 'No', unknown), grpc.status.UNIMPLEMENTED);
  const stream = watch(client, Date.now() + 500);
  const answers = [];
  const ended = new Promise((resolve) => stream.on('error', resolve));
  stream.on('data', (answer) => answers.push(answer));
  assert.strictEqual((await ended).code, grpc.status.DEADLINE_EXCEEDED);
  assert.deepStrictEqual(answers, [Buffer.from([8, 1])]);
}

async function callOften(client, times) {
  const unknown = textField(`${canary}-unknown`);
  for (let number = 0; number < times; number++) {
    assert.deepStrictEqual(await call(client, 'Exists', unknown), Buffer.alloc(0));
  }
}

async function main() {
  const credentials = grpc.credentials.createInsecure();
  const client = new grpc.Client(address, credentials);
  await checkKinds(client);
  const packed = new grpc.Client(address, credentials,
    { 'grpc.default_compression_algorithm': grpc.compressionAlgorithms.gzip });
  // A token of 4,000 letters, which gzip makes short.
  assert.deepStrictEqual(await call(packed, 'Exists', textField('x'.repeat(4000))), Buffer.alloc(0));
  await callOften(client, ALONE);
  await Promise.all(Array.from({ length: AT_ONCE }, () => callOften(client, TOGETHER / AT_ONCE)));
  packed.close();
  client.close();
  console.log('all calls answered');
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
