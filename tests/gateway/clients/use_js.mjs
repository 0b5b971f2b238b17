// What a user of replicate 1.4.0 for JavaScript does, unpatched; prints what came of it as JSON.
// Arguments: the client's folder, the gateway's address, its token, the port of a receiver of
// webhooks, 0 for none, and as JSON the inputs of a cat, of what is slow, and of what fails.
import http from "node:http";
import { createRequire } from "node:module";

const [folder, url, token, port, inputs] = process.argv.slice(2);
const { cat, slow, bad } = JSON.parse(inputs);
const Replicate = createRequire(`${folder}/`)("replicate");
const { validateWebhook } = Replicate;
const client = new Replicate({ auth: token, baseUrl: `${url}/v1` });

// What FileOutput.read() is in Python is blob() here.
async function read(output) {
  const blobs = await Promise.all(output.map((file) => file.blob()));
  const buffers = await Promise.all(blobs.map((blob) => blob.arrayBuffer()));
  return buffers.map((buffer) => Buffer.from(buffer).toString("base64"));
}

function readUrls(urls) {
  return urls.map((url) => url.split(",")[1]);
}

async function refused(call) {
  try {
    await call();
  } catch (error) {
    if (!error.response) return [error.message];
    return [error.response.status, JSON.parse(error.message.match(/\{.*\}/s)[0]).title];
  }
  throw new Error("nothing was refused");
}

function hooked(port) {
  return new Promise((resolve) => {
    const server = http.createServer(async (request, response) => {
      const chunks = [];
      for await (const chunk of request) chunks.push(chunk);
      response.end();
      server.close();
      resolve({ headers: request.headers, body: Buffer.concat(chunks).toString() });
    });
    server.listen(Number(port), "127.0.0.1");
  });
}

async function main() {
  const done = { run: await read(await client.run("me/dmd2", { input: { ...cat, num_outputs: 4 } })) };
  if (port === "0") return done;
  const wait = { mode: "block", timeout: 1 };
  done["early run"] = await read(await client.run("me/dmd2", { input: slow, wait }));
  const made = await client.predictions.create({ model: "me/dmd2", input: cat, wait: true });
  done.created = [made.status, readUrls(made.output), made.metrics.seeds];
  const began = performance.now();
  const early = await client.predictions.create({ version: made.version, input: slow, wait: 1 });
  done.seconds = [(performance.now() - began) / 1000];
  done.early = [early.status, (await client.wait(early, {})).status];
  done.seconds.push((performance.now() - began) / 1000);
  const placed = await client.deployments.predictions.create("you", "place", { input: cat });
  done.polled = [placed.status, placed.model, (await client.wait(placed, {})).status];
  const cut = await client.predictions.create({ model: "me/dmd2", input: slow });
  const ended = await client.predictions.cancel(cut.id);
  done.cancelled = [ended.status, (await client.predictions.get(cut.id)).status];
  const listed = [];
  for await (const page of client.paginate(client.predictions.list)) {
    listed.push(...page.map((each) => each.id));
  }
  done.listed = [ended, placed, early, made].map((each) => listed.indexOf(each.id));
  const versions = (await client.models.versions.list("me", "dmd2")).results;
  const one = await client.models.versions.get("me", "dmd2", versions[0].id);
  const model = await client.models.get("me", "dmd2");
  const ids = [one.id, model.latest_version.id, made.version];
  done.versions = [versions.length, ids.every((id) => id === versions[0].id)];
  done.versioned = await read(await client.run(`me/dmd2:${one.id}`, { input: cat }));
  done.account = (await client.accounts.current()).type;
  const wrong = new Replicate({ auth: "no", baseUrl: `${url}/v1` });
  done.refused = [
    await refused(() => client.run("me/dmd2", { input: bad })),
    await refused(() => client.run("me/dmd2", { input: { ...cat, num_outputs: 5 } })),
    await refused(() => client.run(`me/dmd2:${"0".repeat(64)}`, { input: cat })),
    await refused(() => client.predictions.get("nothing")),
    await refused(() => wrong.run("me/dmd2", { input: cat })),
  ];
  const receiving = hooked(port);
  const webhook = `http://127.0.0.1:${port}/hook`;
  const filter = ["completed"];
  const options = { input: cat, webhook, webhook_events_filter: filter };
  await client.predictions.create({ model: "me/dmd2", ...options });
  const { headers, body } = await receiving;
  const { key } = await client.webhooks.default.secret.get();
  const isValid = await validateWebhook({ headers, body }, key);
  const forged = body.replace("succeeded", "failed");
  const isForged = await validateWebhook({ headers, body: forged }, key);
  const { status, output } = JSON.parse(body);
  done.webhook = isValid && !isForged ? [status, readUrls(output)] : [];
  return done;
}

console.log(JSON.stringify(await main()));
